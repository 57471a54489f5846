"""Every reach into a private name of a library, one file each. `python -m helpers.patches` shows the state of all.

The docstring of a file says why the patch is there; PATCHES says what happens without it; `self_test` raises if the
private name has moved or behaves differently. The functions ask `works` themselves and fall back to the library's own
way, with the same losses. Only `use_cached_reference` can't: its caller asks. Private names are imported inside
functions, so `import helpers` never fails because one has moved.
"""

import functools
import importlib

PATCHES = {
    "text_progress": "Progress bars look as the libraries draw them.",
    "quiet": "A few warnings of the libraries are printed, which change nothing.",
    "fused_lm_head": "Log-probs outside training are computed from stored logits: the same values, more memory.",
    "shared_prompt": "Each pair is computed as two rows, its prompt twice: the same losses, slower.",
    "prompt_segments": "On a GPU each pair is computed as two rows, its prompt twice: the same losses, slower.",
    "cast_once": "LoRA's weights are cast at each use: the same results, a GPU trains somewhat slower.",
    "given_ids": "TRL tokenises the messages once more: the same ids, a later start.",
    "cached_reference": "TRL computes the reference's log-probs itself: the same losses, a later start.",
    "unsloth_checkpointing": "On a GPU gradient checkpointing stays as the adapter was made: other speed and memory.",
    "llama_cpp": "llama.cpp is looked for in ~/.unsloth/llama.cpp (or UNSLOTH_LLAMA_CPP_PATH), by its usual names.",
    "dataset_key": "Nothing that was computed from a dataset is read from the cache; it is computed again.",
}


def expect(true: bool, what: str) -> None:
    """Raise RuntimeError with `what` unless `true`; an `assert` would be silent under `python -O`."""
    if not true:
        raise RuntimeError(what)


def fault(name: str) -> str | None:
    """Why the self-test of the patch `name` fails, in one line; None if it passes."""
    try:
        importlib.import_module(f"helpers.patches.{name}").self_test()
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first[:200]}"
    return None


@functools.cache
def works(name: str) -> bool:
    """Whether the patch `name` passes its self-test, which is run once a process. If it fails, one line says so."""
    reason = fault(name)
    if reason is not None:
        print(f"Patch {name} is left out ({reason}). {PATCHES[name]}", flush=True)
    return reason is None

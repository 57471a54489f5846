"""Every reach into a private name of a library, one file each. `python -m helpers.patches` shows the state of all.

The docstring of a file says why the patch is there; WITHOUT says what happens without it; `self_test` raises if the
private name has moved or behaves differently. The functions ask `works` themselves and fall back to the library's own
way, with the same losses. Only `use_cached_reference` can't: its caller asks. Private names are imported inside
functions, so `import helpers` never fails because one has moved.
"""

import functools
import importlib

PATCHES = (
    "text_progress",
    "quiet",
    "fused_lm_head",
    "shared_prompt",
    "prompt_segments",
    "cast_once",
    "given_ids",
    "cached_reference",
    "unsloth_checkpointing",
    "llama_cpp",
    "dataset_key",
)


def expect(true: bool, what: str) -> None:
    """Raise RuntimeError with `what` unless `true`; an `assert` would be silent under `python -O`."""
    if not true:
        raise RuntimeError(what)


def without(name: str) -> str:
    """What happens without the patch `name`."""
    return importlib.import_module(f"helpers.patches.{name}").WITHOUT


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
    """Whether the patch `name` passes its self-test, which is run once a process. If it fails, one line says so.

    Args:
        name: one of PATCHES.
    """
    reason = fault(name)
    if reason is not None:
        print(f"Patch {name} is left out ({reason}). {without(name)}", flush=True)
    return reason is None

"""Every reach into a private name of a library, one file each. `python -m helpers.patches` shows the state of all.

The docstring of a file says why the patch is there, without.yaml what happens without it; `self_test` raises if the
private name has moved or behaves differently. The functions ask `works` themselves and fall back to the library's own
way, with the same losses. Only `use_cached_reference` can't: its caller asks. Private names are imported inside
functions, so `import helpers` never fails because one has moved.
"""

import contextlib
import functools
import importlib
import sys

from helpers.common import documents

PATCHES: dict[str, str] = documents(__file__, "without.yaml")[0]


def expect(true: bool, what: str) -> None:
    """Raise RuntimeError with `what` unless `true`; an `assert` would be silent under `python -O`."""
    if not true:
        raise RuntimeError(what)


def fault(name: str) -> str | None:
    """Why the self-test of the patch `name` fails, in one line; None if it passes.

    No random number is used up, and it does not matter where it is asked first (gradients off, autocast on).
    """
    try:
        patch, torch = importlib.import_module(f"helpers.patches.{name}"), sys.modules.get("torch")
        with contextlib.ExitStack() as state:
            if torch is not None:
                state.enter_context(torch.random.fork_rng(devices=[]))
                state.enter_context(torch.enable_grad())
                state.enter_context(torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False))
            patch.self_test()
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

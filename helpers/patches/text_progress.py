"""Progress bars as plain text, also in Jupyter, where `tqdm.auto` would draw a widget.

`TQDM_NOTEBOOK=false` is often advised and does nothing: no library reads it. `tqdm.auto` takes its class from
`tqdm.autonotebook` when it is imported, so that module is replaced before the libraries that copy the class are
imported. This module imports nothing heavy, because it runs before Unsloth is imported.
"""

import importlib.util
import sys
from types import ModuleType

from helpers.patches import expect, works


def self_test() -> None:
    """A fresh `tqdm.auto` takes its class from `tqdm.autonotebook`, and `tqdm.std` has its two names."""
    import tqdm.std

    marked = type("Marked", (tqdm.std.tqdm,), {})
    before = sys.modules.get("tqdm.autonotebook")
    sys.modules["tqdm.autonotebook"] = module = ModuleType("tqdm.autonotebook")
    vars(module).update(tqdm=marked, trange=tqdm.std.trange)
    try:
        spec = importlib.util.find_spec("tqdm.auto")
        if spec is None or spec.loader is None:
            raise ImportError("there is no tqdm.auto")
        auto = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(auto)
    finally:
        del sys.modules["tqdm.autonotebook"]
        if before is not None:
            sys.modules["tqdm.autonotebook"] = before
    expect(issubclass(auto.tqdm, marked), "tqdm.auto no longer takes its class from tqdm.autonotebook")


def use_text_progress() -> None:
    """Make every tqdm bar of the libraries that are imported from now on plain text."""
    if not works("text_progress"):
        return
    import tqdm.std

    sys.modules.pop("tqdm.auto", None)
    sys.modules["tqdm.autonotebook"] = tqdm.autonotebook = tqdm.std
    import tqdm.auto

"""The first cell of a notebook: settings from `.env`, text progress, imports in the safe order.

Importing this module imports Unsloth, which patches TRL, transformers and PEFT as they load; that works only when
none of them is imported yet, so this module refuses to go on where one is.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from dotenv import find_dotenv, load_dotenv

PATCHED_BY_UNSLOTH = ("trl", "transformers", "peft")


def load_settings() -> None:
    """Read `.env` from this folder or the nearest one above it; variables that are already set win."""
    load_dotenv(find_dotenv(usecwd=True))


def check_import_order() -> None:
    """Raise ImportError where TRL, transformers or PEFT was imported before Unsloth."""
    if "unsloth" in sys.modules:
        return
    early = [name for name in PATCHED_BY_UNSLOTH if name in sys.modules]
    if early:
        raise ImportError(
            f"{' and '.join(early)} was imported before helpers. Unsloth has to patch it first, or training fails "
            "or runs unpatched. Restart the kernel and make `from helpers import ...` the first import."
        )


def use_text_progress() -> None:
    """Make every tqdm bar plain text, also in Jupyter, where `tqdm.auto` would draw a widget.

    `TQDM_NOTEBOOK=false` is often advised and does nothing: no library reads it. The classes are chosen when
    `tqdm.auto` is imported, so they are replaced there, before the libraries that copy them are imported.
    """
    import tqdm.asyncio
    import tqdm.std

    sys.modules.pop("tqdm.auto", None)
    autonotebook = type(sys)("tqdm.autonotebook")
    autonotebook.tqdm, autonotebook.trange = tqdm.std.tqdm, tqdm.std.trange
    sys.modules["tqdm.autonotebook"] = tqdm.autonotebook = autonotebook
    import tqdm.auto

    tqdm.auto.tqdm, tqdm.auto.trange = tqdm.asyncio.tqdm_asyncio, tqdm.asyncio.tarange


def _quiet_imports() -> None:
    # torchao registers two enums in a way that torch 2.14 calls deprecated, and bitsandbytes looks for an optional
    # package of CPU kernels. Neither changes a result, and a reader can act on neither.
    for name in ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _quiet_loading() -> None:
    # The bar over a model's tensors is gone in a second and stays in a saved notebook; downloads keep their own.
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # takes the hub's bars along
    enable_progress_bars()
    # On a GPU Unsloth says of each folder it saves a tokenizer to, with its path, that it mended its own omission.
    logging.getLogger("transformers.models.llama.modeling_llama").addFilter(
        lambda record: "Restored added_tokens_decoder" not in record.getMessage()
    )
    # Unsloth sets this for a library that the hub no longer uses; in a process started from here it only warns.
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)


def _tokenize_in_this_process() -> None:
    # Unsloth's trainers start up to 8 processes for each of several passes over the pairs. That takes longer than the
    # tokenising, by Unsloth's own measurement (unsloth_zoo/dataset_num_proc.py) still with 8000 rows.
    os.environ.setdefault("UNSLOTH_DATASET_NUM_PROC", "none")


load_settings()
check_import_order()
use_text_progress()
_quiet_imports()
_tokenize_in_this_process()

import datasets  # noqa: E402
import unsloth  # noqa: E402, F401  (after the check and the progress bars, before anything of TRL)

_quiet_loading()


@contextlib.contextmanager
def quiet_progress(rows: int, enough: int = 20_000) -> Iterator[None]:
    """No progress bars of `datasets` where there are fewer than `enough` `rows`, too few to wait for."""
    hide = rows < enough and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()

"""The first cell of a notebook: settings from `.env`, text progress, and Unsloth, which patches TRL as that loads."""

import contextlib
import os
import sys
from collections.abc import Iterator

from dotenv import find_dotenv, load_dotenv

from helpers.common import PROJECT
from helpers.patches.quiet import quiet_libraries
from helpers.patches.text_progress import use_text_progress


def load_settings() -> None:
    """Read `.env` from this folder, the nearest one above it, or the project's; variables that are already set win."""
    load_dotenv(find_dotenv(usecwd=True) or PROJECT / ".env")


load_settings()
early = [name for name in ("trl", "transformers", "peft") if name in sys.modules and "unsloth" not in sys.modules]
if early:
    raise ImportError(
        f"{' and '.join(early)} was imported before helpers. Unsloth has to patch it first, or training fails "
        "or runs unpatched. Restart the kernel and make `from helpers import ...` the first import."
    )
use_text_progress()
quiet_libraries()
# Unsloth's trainers would start up to 8 processes a pass, which by its own measure is slower even with 8000 rows.
os.environ.setdefault("UNSLOTH_DATASET_NUM_PROC", "none")

import datasets  # noqa: E402
import torch  # noqa: E402
import unsloth  # noqa: E402, F401  (after the check and the progress bars, before anything of TRL)
from huggingface_hub.utils import enable_progress_bars  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

# The bar over a model's tensors is gone in a second and stays in a saved notebook; downloads keep their own.
disable_progress_bar()  # takes the hub's bars along
enable_progress_bars()
# Unsloth sets this for a library that the hub no longer uses; in a process started from here it only warns.
os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)
# cuDNN's attention gives gradients that are not a number on an H100 or H200, at lengths of 64 modulo 128 (seen with
# cuDNN 9.19; github.com/pytorch/pytorch/issues/196678). torch has other kernels.
torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def quiet_progress(rows: int) -> Iterator[None]:
    """No progress bars of `datasets` in the block if there are fewer than 20,000 `rows`, too few to wait for."""
    if rows >= 20_000 or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()

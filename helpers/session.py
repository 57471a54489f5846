"""The first and the last cell of a notebook: settings, text progress, imports in the safe order, kernel shutdown.

Importing this module imports Unsloth, which patches TRL, transformers and PEFT as they load; that works only when
none of them is imported yet, so this module refuses to go on where one is.
"""

import gc
import json
import logging
import os
import sys
import threading
import urllib.request
from pathlib import Path

from dotenv import find_dotenv, load_dotenv

PROJECT = Path(__file__).parent.parent  # relative paths in .env start here, wherever a notebook runs
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

import unsloth  # noqa: E402, F401  (after the check and the progress bars, before anything of TRL)

_quiet_loading()


def _notebook_session(kernel_id: str) -> tuple[str, str] | None:
    """(address, token) of the Jupyter session that owns this kernel, or None where no server does."""
    try:
        from jupyter_server.serverapp import list_running_servers
    except ImportError:
        return None
    for server in list_running_servers():
        request = urllib.request.Request(
            server["url"] + "api/sessions", headers={"Authorization": f"token {server['token']}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                sessions = json.load(reply)
        except (OSError, ValueError):  # a server that has gone, or that wants a password
            continue
        for session in sessions:
            if (session.get("kernel") or {}).get("id") == kernel_id:
                return f"{server['url']}api/sessions/{session['id']}", server["token"]
    return None


def _end_session(address: str, token: str) -> None:
    request = urllib.request.Request(address, method="DELETE", headers={"Authorization": f"token {token}"})
    urllib.request.urlopen(request, timeout=10).close()


def _free_memory() -> None:
    import torch

    try:
        from IPython import get_ipython

        shell = get_ipython()
    except ImportError:
        shell = None
    if shell is not None:
        from transformers import Trainer

        heavy = [name for name, value in shell.user_ns.items() if isinstance(value, (torch.nn.Module, Trainer))]
        for name in heavy:
            shell.user_ns.pop(name)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shut_down_kernel() -> None:
    """Free the models' memory; in JupyterLab or Notebook also end this notebook's session.

    Models and trainers are dropped from the notebook's variables. Where a Jupyter server owns this kernel, its
    session is then ended through the server, as "Shut Down Kernel" in the menu does, so that no "kernel died"
    dialog appears. Under nbmake, nbconvert, papermill or plain Python nothing else happens: the program that
    started the kernel ends it.
    """
    _free_memory()
    session = None
    if "ipykernel" in sys.modules:
        from ipykernel.connect import get_connection_file

        try:
            connection = Path(get_connection_file())
        except RuntimeError:  # not inside a kernel
            connection = None
        if connection is not None:
            session = _notebook_session(connection.stem.removeprefix("kernel-"))
    if session is None:
        print("Memory freed.")
        return
    print("Memory freed; this notebook's kernel shuts down now.")
    # A moment later, so that this cell's own reply reaches the browser first.
    timer = threading.Timer(1.0, _end_session, session)
    timer.daemon = True  # the kernel must not wait for the answer of a server that waits for the kernel
    timer.start()


def setting(name: str, default: str | None = None) -> str | None:
    """The setting `name` from the environment or `.env`, else `default`; an empty one counts as not set."""
    return os.environ.get(name, "").strip() or default

"""The last cell of a notebook: free the memory, and end the notebook's session if a Jupyter server owns it."""

import contextlib
import gc
import sys
import threading
from pathlib import Path

import requests
import torch
from IPython import get_ipython
from transformers import Trainer


def _notebook_session(kernel_id: str) -> tuple[str, dict] | None:
    """(address, headers) of the Jupyter session that owns this kernel, or None if no server does."""
    try:
        from jupyter_server.serverapp import list_running_servers
    except ImportError:
        return None
    for server in list_running_servers():
        address, headers = f"{server['url']}api/sessions", {"Authorization": f"token {server['token']}"}
        with contextlib.suppress(OSError, ValueError):  # the server has gone, or asks for a password
            reply = requests.get(address, headers=headers, timeout=10)
            reply.raise_for_status()
            for session in reply.json():
                if (session.get("kernel") or {}).get("id") == kernel_id:
                    return f"{address}/{session['id']}", headers
    return None


def shut_down_kernel() -> None:
    """Free the models' memory; in JupyterLab or Notebook also end this notebook's session.

    Models and trainers are dropped from the notebook's variables. If a Jupyter server owns this kernel, it ends the
    session as "Shut Down Kernel" in its menu does, so that no "kernel died" dialog appears. Under nbmake, nbconvert,
    papermill or plain Python nothing else happens: what started the kernel ends it.
    """
    names = getattr(get_ipython(), "user_ns", {})  # of the notebook's variables; none in plain Python
    for name in [name for name, value in names.items() if isinstance(value, torch.nn.Module | Trainer)]:
        del names[name]
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
    session = None
    if "ipykernel" in sys.modules:
        from ipykernel.connect import get_connection_file

        with contextlib.suppress(RuntimeError):  # ipykernel may be imported outside a kernel
            session = _notebook_session(Path(get_connection_file()).stem.removeprefix("kernel-"))
    if session is None:
        print("Memory freed.")
        return
    print("Memory freed; this notebook's kernel shuts down now.")
    # A moment later, so that this cell's own reply reaches the browser first.
    timer = threading.Timer(1.0, requests.delete, [session[0]], {"headers": session[1], "timeout": 10})
    timer.daemon = True  # the kernel must not wait for the answer of a server that waits for the kernel
    timer.start()

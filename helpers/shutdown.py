"""The last cell of a notebook: free the memory, and end the notebook's session if a Jupyter server owns it."""

import contextlib
import gc
import json
import sys
import threading
import urllib.request
from pathlib import Path

import torch
from IPython import get_ipython
from transformers import Trainer


def _notebook_session(kernel_id: str) -> tuple[str, str] | None:
    """(address, token) of the Jupyter session that owns this kernel, or None if no server does."""
    try:
        from jupyter_server.serverapp import list_running_servers
    except ImportError:
        return None
    for server in list_running_servers():
        address, token = f"{server['url']}api/sessions", server["token"]
        try:
            sessions = json.loads(_ask(address, token))
        except (OSError, ValueError):  # the server has gone, or asks for a password
            continue
        for session in sessions:
            if (session.get("kernel") or {}).get("id") == kernel_id:
                return f"{address}/{session['id']}", token
    return None


def _ask(address: str, token: str, method: str = "GET") -> bytes:
    request = urllib.request.Request(address, method=method, headers={"Authorization": f"token {token}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read()


def shut_down_kernel() -> None:
    """Free the models' memory; in JupyterLab or Notebook also end this notebook's session.

    Models and trainers are dropped from the notebook's variables. If a Jupyter server owns this kernel, its session is
    then ended through the server, as "Shut Down Kernel" in the menu does, so that no "kernel died" dialog appears.
    Under nbmake, nbconvert, papermill or plain Python nothing else happens: what started the kernel ends it.
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
    timer = threading.Timer(1.0, _ask, (*session, "DELETE"))
    timer.daemon = True  # the kernel must not wait for the answer of a server that waits for the kernel
    timer.start()

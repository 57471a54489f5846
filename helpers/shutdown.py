"""The last cell of a notebook: free the memory, and end the notebook's session if a Jupyter server owns it."""

import gc
import json
import sys
import threading
import urllib.request
from pathlib import Path


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

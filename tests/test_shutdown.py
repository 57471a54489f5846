"""The last cell: memory is freed, and a Jupyter server's session ends."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest

import helpers


def test_shutdown_outside_jupyter_only_frees_memory(capsys):
    helpers.shut_down_kernel()
    assert capsys.readouterr().out == "Memory freed.\n"


@pytest.mark.slow
def test_shutdown_ends_the_session_of_a_jupyter_server(tmp_path):
    """A real server and a real kernel: after the call the server has no session left, and it did not restart one."""
    from jupyter_client import BlockingKernelClient

    (tmp_path / "a.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "PYTEST_CURRENT_TEST": ""}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        info = _wait(lambda: next(iter((tmp_path / "runtime").glob("jpserver-*.json")), None), 60)
        info = json.loads(info.read_text())

        def api(path: str, data: dict | None = None):
            request = urllib.request.Request(
                info["url"] + path,
                data=json.dumps(data).encode() if data else None,
                headers={"Authorization": f"token {info['token']}", "Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.load(reply)

        kernel = {"name": "python3"}
        started = api("api/sessions", {"path": "a.ipynb", "name": "a", "type": "notebook", "kernel": kernel})
        kernel_id = started["kernel"]["id"]
        connection = _wait(lambda: next((tmp_path / "runtime").glob(f"kernel-{kernel_id}.json"), None), 60)
        client = BlockingKernelClient(connection_file=str(connection))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=120)
        client.execute("from helpers import shut_down_kernel; shut_down_kernel()")
        text = []
        while not any("shuts down" in part for part in text):
            message = client.get_iopub_msg(timeout=120)
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == "stream":
                text.append(message["content"]["text"])
        _wait(lambda: api("api/sessions") == [], 30)
        time.sleep(3)
        assert api("api/kernels") == []  # and none was started in its place
    finally:
        server.terminate()
        server.wait(30)


def _wait(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")

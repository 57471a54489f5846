"""Imports in the safe order, text progress, settings, and the end of a kernel."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest

import helpers
from helpers import common, session


def run(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("early", ["trl", "transformers", "peft"])
def test_wrong_import_order_is_named(early):
    result = run(f"import {early}\nimport helpers")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and early in last
    assert "Restart the kernel" in last and "from helpers import" in last


@pytest.mark.slow
def test_unsloth_before_trl_is_accepted():
    result = run("import unsloth, trl\nimport helpers\nprint(helpers.DPOTrainer.__name__)")
    assert result.returncode == 0, result.stderr
    assert "DPOTrainer" in result.stdout


def test_progress_is_text_in_every_library():
    from datasets.utils import tqdm as of_datasets
    from huggingface_hub.utils import tqdm as of_hub
    from tqdm.auto import tqdm as of_auto
    from tqdm.std import tqdm as text

    for bar in (of_datasets, of_hub, of_auto):
        assert issubclass(bar, text)
        assert [cls.__name__ for cls in bar.__mro__ if "notebook" in cls.__name__] == []
    # A bar in a kernel writes to stderr; the widget class is not even loaded.
    assert "tqdm.notebook" not in sys.modules


def test_trainers_tokenise_without_processes_of_their_own():
    from unsloth_zoo.dataset_num_proc import get_dataset_num_proc

    assert get_dataset_num_proc() is None


def test_bf16_question_has_an_answer():
    assert helpers.is_bf16_supported() in (True, False)


def test_settings_come_from_the_nearest_env_file_and_never_override(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("DPO_TEST_A=from file\nDPO_TEST_B=from file\n")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("DPO_TEST_A", "set before")
    monkeypatch.setenv("DPO_TEST_B", "to be removed")
    monkeypatch.delenv("DPO_TEST_B")
    session.load_settings()
    assert common.setting("DPO_TEST_A") == "set before"
    assert common.setting("DPO_TEST_B") == "from file"
    assert common.setting("DPO_TEST_C", "default") == "default"


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

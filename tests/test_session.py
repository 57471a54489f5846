"""Imports in the safe order, text progress and settings."""

import subprocess
import sys

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

"""What run.json holds, and run folders that cannot be read. No model is loaded."""

import json

import pytest

from helpers import UserError
from helpers.run.folder import POLICY_AT_START, Run, RunInfo, Status, read_info, write_info


@pytest.fixture
def folder(first, tmp_path):
    """A run folder as version 1 left it, without its adapter."""
    (tmp_path / "run.json").write_text(json.dumps(first))
    (tmp_path / "history.json").write_text("[]")
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.75}')
    (tmp_path / "held_out.jsonl").write_text('{"origin": "pairs.jsonl:1"}\n')
    return tmp_path


def test_a_run_of_version_1_loads(first, folder):
    info = Run.load(folder).info
    assert info.status == Status.FINISHED and info.reference == POLICY_AT_START
    assert (info.steps, info.data.findings, info.data.prompts) == (24, {"over_max_length": 2}, {})
    assert info.prompts_rule == {"max_prompt_length": 256, "on_long_prompt": "shorten"}
    assert info.schema == 1 and not info.data.bundled
    assert first.items() <= (info.to_json() | {"data": first["data"]}).items()


def test_what_is_written_is_read_again(first, folder):
    info = RunInfo.from_json(first | {"status": "running", "end": None, "steps": None})
    info.data.prompts["shortened"] = 3
    write_info(folder, info)
    assert read_info(folder) == info and info["status"] == "running"


def test_names_of_a_later_version_are_ignored(first):
    assert RunInfo.from_json(first | {"colour": "blue"}) == RunInfo.from_json(first)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"base": None, "end": None}, "lacks base, end: it was written by another version"),
        ({"data": {"train": "a"}}, "lacks data.test"),
        ({"status": "tired"}, "lacks status"),
        ({"config": {"beta": 0.1}}, "lacks config.max_length"),
        ({"config": {"beta": "high", "max_length": 512}}, "lacks config.beta"),
        ({"config": "none"}, "lacks config:"),
        ({"schema": 3}, "was written by a newer version"),
    ],
)
def test_what_is_missing_is_named(first, folder, changes, what):
    values = {name: value for name, value in (first | changes).items() if value is not None}
    (folder / "run.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{folder.name}/run.json {what}"):
        Run.load(folder)


def test_run_folders_that_cannot_be_read(first, folder):
    def damaged(name: str, text: str, message: str) -> None:
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            Run.load(folder)
        (folder / name).write_text(before)

    damaged("run.json", json.dumps(first | {"status": "running"}), "is running.*train_dpo again")
    damaged("run.json", json.dumps(first | {"status": "out of memory"}), "is out of memory.*diagnose")
    damaged("run.json", "{", "not valid JSON")
    damaged("run.json", "[]", "not valid JSON")
    damaged("history.json", "[", "cannot be read")
    damaged("held_out.jsonl", '{"origin": ', "cannot be read")
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match="no run.json.*03_train"):
        Run.load(folder)

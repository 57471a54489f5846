"""What run.json holds, and run folders that cannot be read. No model is loaded."""

import json

import pytest

from helpers import UserError
from helpers.run.folder import POLICY_AT_START, Run, RunInfo, Status, read_info, write_info

# As version 1 wrote it: a finished run of 03_train, of whose 131 settings two are left.
FIRST = {
    "status": "finished",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "profile": "cpu",
    "config": {"beta": 0.1, "max_length": 512},
    "steps": 24,
    "train_pairs": 192,
    "test_pairs": 120,
    "data": {"train": "3d09f714980574a1daab", "test": "f82342fc5a28ded3a9e7", "findings": {"over_max_length": 2}},
    "base": "cb000db86ce8f0e961d4",
    "start": "a3591da504ca338d23ac",
    "reference": "the policy at its start",
    "versions": {"python": "3.11.7", "torch": "2.14.1", "trl": "1.15.0"},
    "machine": "CPU x86_64, 2 threads",
    "memory_gb": {"needed": 1.36, "free": 22.83},
    "end": "2333e03ca94c0ff5c989",
    "lora": {"adapter": {"r": 16, "lora_alpha": 16, "use_rslora": False}},
}


@pytest.fixture
def folder(tmp_path):
    """A run folder as version 1 left it, without its adapter."""
    (tmp_path / "run.json").write_text(json.dumps(FIRST))
    (tmp_path / "history.json").write_text("[]")
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.75}')
    (tmp_path / "held_out.jsonl").write_text('{"origin": "pairs.jsonl:1"}\n')
    return tmp_path


def test_a_run_of_version_1_loads(folder):
    info = Run.load(folder).info
    assert info.status == Status.FINISHED and info.reference == POLICY_AT_START
    assert (info.steps, info.data.findings, info.data.prompts) == (24, {"over_max_length": 2}, {})
    assert info.prompts_rule == {"max_prompt_length": 256, "on_long_prompt": "shorten"}
    assert info.schema == 1
    assert FIRST.items() <= (info.to_json() | {"data": FIRST["data"]}).items()


def test_what_is_written_is_read_again(folder):
    info = RunInfo.from_json(
        {name: FIRST[name] for name in FIRST if name not in ("end", "steps")} | {"status": "running"}
    )
    info.data.prompts["shortened"] = 3
    write_info(folder, info)
    assert read_info(folder) == info


def test_names_of_a_later_version_are_ignored():
    assert RunInfo.from_json(FIRST | {"colour": "blue"}) == RunInfo.from_json(FIRST)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"base": None, "end": None}, "lacks base, end: it was written by another version"),
        ({"data": {"train": "a"}}, "lacks data.test"),
        ({"status": "tired"}, "lacks status"),
        ({"config": {"beta": 0.1}}, "lacks config.max_length"),
        ({"config": {"beta": "high", "max_length": 512}}, "lacks config.beta"),
        ({"config": "none"}, "lacks config:"),
    ],
)
def test_what_is_missing_is_named(folder, changes, what):
    values = {name: value for name, value in (FIRST | changes).items() if value is not None}
    (folder / "run.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{folder.name}/run.json {what}"):
        Run.load(folder)


def test_run_folders_that_cannot_be_read(folder):
    def damaged(name: str, text: str, message: str) -> None:
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            Run.load(folder)
        (folder / name).write_text(before)

    damaged("run.json", json.dumps(FIRST | {"status": "running"}), "is running.*train_dpo again")
    damaged("run.json", json.dumps(FIRST | {"status": "out of memory"}), "is out of memory.*diagnose")
    damaged("run.json", "{", "not valid JSON")
    damaged("run.json", "[]", "not valid JSON")
    damaged("history.json", "[", "cannot be read")
    damaged("held_out.jsonl", '{"origin": ', "cannot be read")
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match="no run.json.*03_train"):
        Run.load(folder)

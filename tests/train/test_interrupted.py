"""Runs that are interrupted at random and called again end as if nothing had happened.

Each interruption is a real SIGKILL or SIGINT (Ctrl-C) in a forked process, at a place that a seed draws: in a step, an
evaluation, the writing of a file, or the scoring before and after. By hand, with as many seeds as one likes:
python tests/train/test_interrupted.py FOLDER_OF_A_MODEL EMPTY_FOLDER SEED SEED ...
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow

import helpers  # noqa: E402, I001  (first: Unsloth before transformers)
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from helpers import UserError  # noqa: E402
from helpers.run.folder import Run  # noqa: E402
from helpers.train.processes import alone_in  # noqa: E402

WORDS = """apple river stone window garden pencil bridge candle forest ladder mirror needle orange pepper rabbit saddle
ticket velvet walnut yellow anchor basket carpet desert engine feather guitar hammer""".split()
# Short, so that a step takes a moment.
PAIRS = [
    Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is a {word}?"}],
                "chosen": [{"role": "assistant", "content": f"A {word} is a thing."}],
                "rejected": [{"role": "assistant", "content": f"No idea, {place}."}],
            }
            for place, word in enumerate(words)
        ]
    )
    for words in (WORDS[:21], WORDS[21:])
]
# By a function on the way there: where a forward, or the change of a file, belongs.
PLACES = {"pair_logps": "scoring", "training_step": "step", "evaluation_loop": "evaluation"}
FILES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
# Three steps an epoch, the last of them of five pairs; the best checkpoint is not the last one.
SETTINGS = {
    "learning_rate": 0.2,
    "warmup_steps": 0,
    "bf16": False,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
}
RUNS = {
    "epochs": {"num_train_epochs": 3},
    "steps": {"max_steps": 7, "eval_on_start": True},  # in the middle of an epoch
    "early": {
        "num_train_epochs": 5,
        "early_stopping": 2,
        "metric_for_best_model": "eval_rewards/accuracies",  # soon 1, on any machine
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
    },
    "by epoch": {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch"},
}


def place() -> str:
    """Where the program is: "start" if it looks whether the policy is its reference."""
    frame = sys._getframe()  # noqa: SLF001  (the way to here)
    while frame is not None:
        if frame.f_code.co_name in PLACES:
            return PLACES[frame.f_code.co_name]
        frame = frame.f_back
    return "start"


class Interrupter:
    """Counts the events of each place, and at the one that was drawn sends the signal to its own process."""

    def __init__(self, where: str = "", number: int = 0, kind: int = 0):
        self.seen, self.drawn, self.kind = Counter(), (where, number), kind

    def forward(self, *_) -> None:
        self.count(place())

    def file(self, event: str, arguments: tuple, folder: str) -> None:
        changes = event in FILES or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(folder):
            self.count("saving")

    def count(self, where: str) -> None:
        self.seen[where] += 1
        if (where, self.seen[where]) == self.drawn:
            os.kill(os.getpid(), self.kind)


def train_in_a_child(model, tokenizer, folder: Path, settings: dict, interrupter: Interrupter) -> int:
    """The exit code of `train_dpo` in a fork of this process; it writes down what it counted."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.environ["DPO_CACHE_DIR"] = str(folder / "cache")
        with (folder.parent / f"{folder.name}.log").open("a", buffering=1) as log, contextlib.redirect_stdout(log):
            model.get_input_embeddings().register_forward_pre_hook(interrupter.forward)
            sys.addaudithook(lambda event, arguments: interrupter.file(event, arguments, str(folder / "run")))
            try:
                helpers.train_dpo(model, tokenizer, *PAIRS, folder / "run", **SETTINGS | settings)
                code = 0
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc(file=log)
        (folder / "seen.json").write_text(json.dumps(interrupter.seen))
    finally:
        os._exit(code)


def outcome(folder: Path, name: str = "run") -> dict:
    """What a finished run is compared by."""
    run = Run.load(folder / name)
    names = ("loss", "eval_loss", "grad_norm", "rewards/margins", "eval_rewards/margins")
    return {
        "history": [[row["step"], name, row[name]] for row in run.history for name in names if name in row],
        "steps": run.info.steps,
        "held out": run.held_out.chosen_policy.tolist(),
        "weights": {k: v.tolist() for k, v in load_file(run.adapter / "adapter_model.safetensors").items()},
        "files": sorted(
            {path.name for path in run.folder.iterdir()} - {"checkpoints"}
        ),  # if killed while these are removed
    }


def main(model_folder: str, folder: Path, seeds: list[int]) -> None:
    """Print one JSON object a seed: what was drawn, how the processes ended, what differs from the whole run."""
    model, tokenizer = helpers.load_model(model_folder)
    model = helpers.add_lora(model.float())
    whole, seen = {}, {}
    for name, settings in RUNS.items():
        (folder / name).mkdir(parents=True)
        assert train_in_a_child(model, tokenizer, folder / name, settings, Interrupter()) == 0, name
        whole[name] = outcome(folder / name)
        seen[name] = json.loads((folder / name / "seen.json").read_text())
    for seed in seeds:
        draw, own = random.Random(seed), folder / f"seed-{seed}"
        own.mkdir()
        name, kind = draw.choice(list(RUNS)), (signal.SIGKILL, signal.SIGINT)[seed // 4 % 2]
        where = ["step", "evaluation", "saving", "scoring"][seed % 4]
        hits, codes = [], []
        for _ in range(draw.choice((1, 1, 2, 3))):
            hits.append((where, draw.randint(1, seen[name][where]), kind))
            codes.append(train_in_a_child(model, tokenizer, own, RUNS[name], Interrupter(*hits[-1])))
            where, kind = draw.choice(list(seen[name])), draw.choice((signal.SIGKILL, signal.SIGINT))
        codes.append(train_in_a_child(model, tokenizer, own, RUNS[name], Interrupter()))
        ends = outcome(own) if codes[-1] == 0 else {}
        differs = [one for one, value in whole[name].items() if ends.get(one) != value]
        drawn = [f"{where} {number} {signal.Signals(kind).name}" for where, number, kind in hits]
        print(json.dumps({"seed": seed, "run": name, "drawn": drawn, "codes": codes, "differs": differs}), flush=True)


def test_interrupted_runs_end_as_the_whole_one(small, tmp_path):
    """Twenty seeds, in two processes of one core each."""
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, small, tmp_path / str(half), *map(str, range(half, 20, 2))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | own,
        )
        for half in range(2)
    ]
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=840)
        assert process.returncode == 0, err[-3000:]
        ends += [json.loads(line) for line in out.splitlines() if line.startswith('{"seed"')]
    print(*ends, sep="\n")
    assert [end for end in ends if end["differs"]] == []
    assert sorted(end["seed"] for end in ends) == list(range(20))
    assert {drawn.split()[0] for end in ends for drawn in end["drawn"]} >= {*PLACES.values(), "saving"}
    assert {-signal.SIGKILL, 130} <= {code for end in ends for code in end["codes"]}


# ------------------------------------------------------------------------------------------------ one at a time


class At(TrainerCallback):
    """Calls `action` once: when `hook` is called at `step`."""

    def __init__(self, hook: str, step: int, action):
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                setattr(self, hook, lambda *args, **kwargs: None)
                action()

        setattr(self, hook, act)


class Crash(Exception):
    """As if the process had been killed."""


def crash() -> None:
    raise Crash


@pytest.fixture
def call(small, tmp_path, monkeypatch):
    """`train_dpo` in fp32 on the small model, each time from the same start; without `settings` as `RUNS["steps"]`."""
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these learning rates it depends on the rounding when a run is at its best
    model, tokenizer = helpers.load_model(str(small))
    policy = helpers.add_lora(model.float())
    fresh = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(policy).items()}

    def train(name: str, *callbacks: TrainerCallback, **settings):
        set_peft_model_state_dict(policy, fresh)
        own = SETTINGS | (settings or RUNS["steps"])
        return helpers.train_dpo(policy, tokenizer, *PAIRS, tmp_path / name, callbacks=callbacks, **own)

    train.policy, train.tokenizer, train.fresh = policy, tokenizer, fresh
    yield train
    torch.set_num_threads(threads)


def same(one: Run, other: Run) -> None:
    """Compare two runs."""
    one, other = outcome(one.folder.parent, one.folder.name), outcome(other.folder.parent, other.folder.name)
    assert [name for name in one if one[name] != other[name]] == []


def test_patience_of_early_stopping_outlives_a_kill(call):
    whole = call("whole", **RUNS["early"])
    last = whole.info.steps
    assert 4 < last < 15, "it has to be early stopping that ends it"
    with pytest.raises(Crash):
        call("run", At("on_step_begin", last - 1, crash), **RUNS["early"])
    same(call("run", **RUNS["early"]), whole)


@pytest.mark.parametrize("name", ["steps", "early", "epochs"])
def test_nothing_is_trained_after_the_last_step(call, name):
    whole = call("whole", **RUNS[name])
    with pytest.raises(Crash):
        call("run", At("on_train_end", whole.info.steps, crash), **RUNS[name])
    same(call("run", **RUNS[name]), whole)


@pytest.mark.parametrize("name, step", [("epochs", 1), ("by epoch", 1), ("by epoch", 2)])
def test_ctrl_c_loses_no_evaluation_and_adds_none(call, name, step, capsys):
    """In the second step, due for one or in the middle of an epoch that ends with one, and in the last of the epoch."""
    whole = call("whole", **RUNS[name])
    with pytest.raises(KeyboardInterrupt):
        call("run", At("on_step_begin", step, lambda: os.kill(os.getpid(), signal.SIGINT)), **RUNS[name])
    same(call("run", **RUNS[name]), whole)
    assert f"Resuming from step {step + 1}" in capsys.readouterr().out


def test_ctrl_c_in_the_step_after_which_early_stopping_ends_the_run(call):
    """Evaluated by epoch, so only after the checkpoint that Ctrl-C asks for."""
    settings = RUNS["early"] | {"early_stopping": 1, "eval_strategy": "epoch", "save_strategy": "epoch"}
    whole = call("whole", **settings)
    last = whole.info.steps
    assert 4 < last < 15, "it has to be early stopping that ends it"
    with pytest.raises(KeyboardInterrupt):
        call("run", At("on_step_begin", last - 1, lambda: os.kill(os.getpid(), signal.SIGINT)), **settings)
    same(call("run", **settings), whole)


def test_ctrl_c_within_an_epoch_saves_once_and_does_not_evaluate(call, tmp_path):
    """What is due at the end of the epoch is not yet due where Ctrl-C leaves it."""
    with pytest.raises(KeyboardInterrupt):
        call("run", At("on_step_begin", 1, lambda: os.kill(os.getpid(), signal.SIGINT)), **RUNS["by epoch"])
    (state,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*/trainer_state.json")
    assert [row for row in json.loads(state.read_text())["log_history"] if "eval_loss" in row] == []
    assert not (state.parent / "ended").exists()


def test_ctrl_c_in_the_last_step_is_evaluated_where_the_epoch_is_left(call):
    """Evaluated by epoch; `max_steps` ends the run in the middle of one, which is then due."""
    settings = {"max_steps": 4, "eval_strategy": "epoch", "save_strategy": "epoch"}
    whole = call("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        call("run", At("on_step_begin", 3, lambda: os.kill(os.getpid(), signal.SIGINT)), **settings)
    same(call("run", **settings), whole)


def test_first_row_after_a_resume_says_of_how_many_steps_its_mean_is(call):
    settings = {"max_steps": 7, "logging_steps": 3, "logging_first_step": False}
    whole = call("whole", **settings)
    with pytest.raises(Crash):
        call("run", At("on_step_begin", 5, crash), **settings)  # after the checkpoint of step 4
    run = call("run", **settings)
    rows = [[row for row in one.history if "loss" in row] for one in (whole, run)]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]] == [3, 6, 7]  # the last one too
    assert rows[1][1]["mean_of_steps"] == 2 and rows[1][1]["loss"] != rows[0][1]["loss"]
    assert not any("mean_of_steps" in row for row in [*rows[0], rows[1][0], rows[1][2]])
    assert run.held_out.equals(whole.held_out)


@pytest.mark.parametrize("hook, step", [("on_step_begin", 5), ("on_train_end", 7)])
def test_run_folder_that_was_moved_keeps_its_best_checkpoint(call, tmp_path, hook, step):
    """The worst one, by a turned metric. What trainer_state.json says of it is the path before."""
    settings = RUNS["steps"] | {"greater_is_better": True}
    whole = call("whole", **settings)
    losses = [row["eval_loss"] for row in whole.history if "eval_loss" in row and row["step"]]
    assert whole.metrics["loss"] == pytest.approx(max(losses)) and max(losses) > losses[-1] + 0.01
    with pytest.raises(Crash):
        call("run", At(hook, step, crash), **settings)
    (tmp_path / "run").rename(tmp_path / "moved")
    same(call("moved", **settings), whole)


def checkpoints_of(run: Path) -> list[Path]:
    """By their steps."""
    return sorted((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("damage", [bytes, lambda size: None], ids=["zeros", "a bit"])
def test_checkpoint_that_was_damaged_in_place_is_not_used(call, tmp_path, capsys, name, damage):
    """Its files have their sizes: zeros are what a machine that lost its power leaves."""
    with pytest.raises(Crash):
        call("run", At("on_step_begin", 5, crash))
    file = checkpoints_of(tmp_path / "run")[-1] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(damage(len(content)) or content)
    same(call("run"), call("whole"))
    out = capsys.readouterr().out
    assert "checkpoint-4 is incomplete or damaged" in out and "Resuming from step 2" in out


@pytest.mark.parametrize("hook, step", [("on_step_begin", 5), ("on_train_end", 7)])
def test_checkpoint_whose_best_one_is_gone_is_not_used(call, tmp_path, hook, step):
    settings = RUNS["steps"] | {"greater_is_better": True}
    whole = call("whole", **settings)
    with pytest.raises(Crash):
        call("run", At(hook, step, crash), **settings)
    last = checkpoints_of(tmp_path / "run")[-1]
    best = last.with_name(Path(json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"]).name)
    shutil.rmtree(best)
    same(call("run", **settings), whole)


@pytest.mark.parametrize("limit, kept", [(1, ["6"]), (2, ["4", "6"]), (0, ["2", "4", "6"])])
def test_last_checkpoints_are_kept_by_their_steps_and_not_by_their_times(call, tmp_path, limit, kept):
    """The older ones lie in the future, as after a copy; and what has another name is not the run's."""
    settings = {"max_steps": 7, "eval_strategy": "no", "save_total_limit": limit}
    folder = tmp_path / "run" / "checkpoints"

    def later() -> None:
        for path in checkpoints_of(tmp_path / "run"):
            os.utime(path, (2e9, 2e9))
        (folder / "checkpoint-4-mine").mkdir()

    with pytest.raises(Crash):
        call("run", At("on_step_begin", 5, later), At("on_step_begin", 6, crash), **settings)
    names = {path.name for path in folder.glob("checkpoint-*")}
    assert names == {"checkpoint-4-mine", *(f"checkpoint-{step}" for step in kept)}
    same(call("run", **settings), call("whole", **settings))


def test_call_that_would_train_otherwise_is_another_run(call, small, tmp_path):
    """What no DPOConfig holds: how an adapter of the same weights is scaled, and early stopping."""
    other = helpers.add_lora(helpers.load_model(str(small))[0].float())
    for module in other.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 4
    other.peft_config["default"].lora_alpha *= 4
    with pytest.raises(Crash):
        call("run", At("on_step_begin", 5, crash))
    with pytest.raises(UserError, match="another run .lora_alpha 16 there, 64 now"):
        helpers.train_dpo(other, call.tokenizer, *PAIRS, tmp_path / "run", **SETTINGS | RUNS["steps"])
    with pytest.raises(UserError, match="another run .early_stopping None there, 2 now"):
        call("run", **RUNS["steps"] | {"early_stopping": 2})
    first = call("early", **RUNS["early"])
    with pytest.raises(UserError, match="another run .early_stopping 2 there, 5 now"):
        call("early", **RUNS["early"] | {"early_stopping": 5})
    named_otherwise = RUNS["early"] | {"metric_for_best_model": "rewards/accuracies", "loss_weights": [1.0]}
    assert call("early", **named_otherwise).metrics == first.metrics


def test_adapter_of_a_finished_run_that_was_damaged_is_not_loaded(call, tmp_path):
    run = call("run", max_steps=1)
    weights = run.adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content, words in ((whole[:-9], "is damaged"), (whole[:-1] + b"\1", "not the one"), (None, "holds no")):
        weights.unlink() if content is None else weights.write_bytes(content)
        with pytest.raises(UserError, match=f"run/adapter.*{words}.*in another folder"):
            call("run", max_steps=1)
        assert all(torch.equal(value, call.fresh[k]) for k, value in get_peft_model_state_dict(call.policy).items())


def test_one_folder_of_two_names_and_one_that_is_where_one_is(call, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    found = []

    def second() -> None:
        with pytest.raises(UserError, match="Another run is training"), alone_in(tmp_path / "link"):
            pass
        found.append("refused")

    monkeypatch.chdir(tmp_path / "run")
    settings = SETTINGS | {"max_steps": 1, "callbacks": [At("on_step_begin", 0, second)]}
    helpers.train_dpo(call.policy, call.tokenizer, *PAIRS, ".", **settings)
    assert found == ["refused"] and call("link", max_steps=1).folder == tmp_path / "run"


def test_files_of_something_else_are_not_written_over(call, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds README.md and no run.json.*replace=True"):
        call("run", max_steps=1)
    (tmp_path / "run" / ".note.20260101").write_text("mine")
    call("run", max_steps=1, replace=True)
    assert sorted(path.name for path in (tmp_path / "run.old-1").iterdir()) == [".note.20260101", "README.md"]
    (tmp_path / "other" / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(UserError, match="holds checkpoints and no run.json"):
        call("other", max_steps=1)


@pytest.fixture
def read_only(disk):
    """A function: makes that file system read-only, or writable again."""

    def now(option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)

    yield now
    now("rw")


def test_place_that_cannot_be_written(call, disk, read_only):
    """A finished run is loaded, what would be written is refused; its folder may be the only one to be written."""
    whole = call("disk/run", max_steps=1)
    read_only("ro")
    same(call("disk/run", max_steps=1), whole)
    for name, settings in (("disk/new", {}), ("disk/run", {"max_steps": 2, "replace": True})):
        with pytest.raises(UserError, match=r"could not be written .*\(Read-only file system\)"):
            call(name, **{"max_steps": 1} | settings)
    read_only("rw")
    (disk / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk / "mounted")], check=True)
    read_only("ro")
    try:
        assert call("disk/mounted", max_steps=1).metrics["loss"] == whole.metrics["loss"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk / "mounted")], check=True)


@pytest.mark.parametrize("name", ["n" * 250, "file/run"])
def test_folder_that_cannot_be_made(call, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="could not be written to .*another folder|could not be written to .*can be written"
    ):
        call(name + "x" * 6, max_steps=1)


WEIGHTS, TOKENIZER = "adapter_model.safetensors", "tokenizer.json"


@pytest.mark.parametrize(
    "hook, step, room_for",
    [
        ("on_step_begin", 3, []),
        ("on_step_begin", 3, [WEIGHTS]),
        ("on_step_begin", 3, [WEIGHTS, TOKENIZER]),
        ("on_train_end", 7, []),
        ("on_train_end", 7, [WEIGHTS]),
    ],
)
def test_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(call, disk, hook, step, room_for):
    """Full in the weights (safetensors), the tokenizer (tokenizers) or what follows, of a checkpoint or of the end."""
    whole = call("whole")

    def fill() -> None:
        saved = next((disk / "run" / "checkpoints").glob("checkpoint-*"))
        room = sum((saved / name).stat().st_size + 50_000 for name in room_for)
        (disk / "filler").write_bytes(b"0" * (shutil.disk_usage(disk).free - room))

    with pytest.raises(UserError, match=r"to .*run \(No space left on device\). .*checkpoint is kept; make room"):
        call("disk/run", At(hook, step, fill))
    assert all(torch.equal(value, call.fresh[name]) for name, value in get_peft_model_state_dict(call.policy).items())
    with pytest.raises(UserError, match="could not be written"):
        call("disk/run")
    (disk / "filler").unlink()
    same(call("disk/run"), whole)


@pytest.mark.parametrize(
    "hook, error",
    [
        ("on_log", ConnectionError("the dashboard is gone")),
        ("on_save", OSError(errno.ENOSPC, "No space left on device", "dashboard.log")),
    ],
)
def test_an_error_of_a_reporter_is_not_one_of_writing_the_run(call, hook, error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as found:
        call("run", At(hook, 1, fail), max_steps=2, eval_strategy="no", save_steps=1)
    assert found.value is error
    assert all(torch.equal(value, call.fresh[name]) for name, value in get_peft_model_state_dict(call.policy).items())


def test_an_error_of_trls_own_cache_is_not_one_of_writing_the_run(call, monkeypatch, tmp_path):
    """TRL scores the reference for `ld_alpha`, and keeps that next to the data set."""
    place = tmp_path / "a file"
    place.touch()
    monkeypatch.setattr(Dataset, "_get_cache_file_path", lambda *_: str(place / "reference.arrow"))
    with pytest.raises(OSError, match="a file"):
        call("run", max_steps=1, ld_alpha=0.5)


def test_another_run_is_put_aside_only_if_asked(call, tmp_path):
    one, other = {"max_steps": 2}, {"max_steps": 3}
    first = call("run", **one)
    with pytest.raises(UserError, match="max_steps 2 there, 3 now"):
        call("run", **other)
    call("run", **other, replace=True)
    assert Run.load(tmp_path / "run.old-1").metrics == first.metrics
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        call("run", **other)
    call("run", **other, replace=True)
    assert (tmp_path / "run.old-2" / "run.json").read_text() == "{"


def test_reference_that_cannot_be_cached_does_not_stop_the_run(call, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file in its place")
    call("run", max_steps=1)
    assert "log-probs could not be kept in" in capsys.readouterr().out


def test_second_run_in_a_folder_is_refused_and_the_first_one_is_not_disturbed(call, tmp_path):
    codes = []

    def second() -> None:
        child, code = os.fork(), 1
        if child:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            return
        try:
            with alone_in(tmp_path / "run"):
                pass
        except UserError as error:
            code = 7 if "Another run is training" in str(error) else 1
        finally:
            os._exit(code)

    same(call("run", At("on_step_begin", 3, second)), call("whole"))
    assert codes == [7]


def test_folder_that_vanishes_is_made_again_with_the_adapter_that_it_began_with(call, tmp_path):
    with torch.no_grad():
        for name, tensor in call.fresh.items():
            tensor += 0.01 * ("lora_B" in name)  # trained before, so the run's folder keeps it
    vanish = At("on_step_begin", 3, lambda: shutil.rmtree(tmp_path / "run"))
    crashes = At("on_step_begin", 5, crash)
    with pytest.raises(Crash):
        call("run", vanish, crashes)
    assert not (tmp_path / "run" / "reference").exists()
    same(call("run", At("on_step_begin", 6, lambda: shutil.rmtree(tmp_path / "run"))), call("whole"))
    kept = load_file(tmp_path / "run" / "reference" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in call.fresh.items())


def test_template_that_writes_the_date_makes_no_other_run_tomorrow(call, day, tmp_path, capsys):
    call.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + call.tokenizer.chat_template
    settings = RUNS["steps"] | {"load_best_model_at_end": False}  # the best may be among what is removed
    day(1)
    whole = call("whole", **settings)
    with pytest.raises(Crash):
        call("run", At("on_step_begin", 5, crash), **settings)
    vanish = At("on_step_begin", 3, lambda: shutil.rmtree(tmp_path / "gone"))
    with pytest.raises(Crash):
        call("gone", vanish, At("on_step_begin", 5, crash), **settings)
    day(2)
    for name in ("run", "gone"):
        vanish = At("on_step_begin", 6, lambda name=name: shutil.rmtree(tmp_path / name))
        same(call(name, vanish, **settings), whole)
        assert "Resuming from step 4" in capsys.readouterr().out
        shutil.rmtree(tmp_path / name / "tokens")  # for what is finished they are not needed
        call(name, **settings)
        assert "finished already" in capsys.readouterr().out
    call.tokenizer.chat_template = call.tokenizer.chat_template.replace("%d", "day %d")
    with pytest.raises(UserError, match="other data"):
        call("run", **settings)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), list(map(int, sys.argv[3:])))

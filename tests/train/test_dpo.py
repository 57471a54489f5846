"""Settings, the reference, the run folder, and runs that are interrupted."""

import copy
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

import helpers
from helpers import UserError
from helpers.data.load import load_pairs
from helpers.model.embedded import embedded_folder
from helpers.model.logps import pair_logps, reference_logps, with_reference
from helpers.model.profiles import PROFILES
from helpers.run.folder import DataInfo, Run, RunInfo, Status, set_aside
from helpers.train import dpo, job, resume, settings
from helpers.train.dpo import train_dpo
from helpers.train.job import check_both
from helpers.train.settings import DPOConfig, dpo_settings
from helpers.train.trainer import make_trainer
from tests.conftest import strip

# Four steps of four pairs: enough to move, short enough to repeat.
SHORT = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}

RULE = {"max_prompt_length": 256, "on_long_prompt": "shorten"}


@pytest.fixture(scope="module")
def pairs():
    loaded = load_pairs()
    return loaded.select(range(16)), loaded.select(range(16, 22))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of reference log-probs of this test's own, next to the converted model of all."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: folder)
    return folder


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "name, cure",
    [
        ("bta", "did you mean 'beta'"),
        ("max_prompt_length", "check_pairs"),
        ("rpo_alpha", "sft"),
        ("zzz", "help"),
    ],
)
def test_unknown_settings_are_refused_with_a_cure(name, cure, tmp_path):
    with pytest.raises(UserError, match=f"'{name}'.*{cure}"):
        DPOConfig(output_dir=str(tmp_path), **{name: 1})


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("helpers.train.settings.current_profile", lambda: PROFILES["gpu"])


class Loaded:
    """What `dpo_settings` looks at in a model: its name, and the length that it was loaded for."""

    def __init__(self, name, max_seq_length):
        self.config, self.max_seq_length = SimpleNamespace(name_or_path=str(name)), max_seq_length


def test_gpu_defaults_are_those_of_the_readme(gpu):
    settings = dpo_settings()
    expected = {"learning_rate": 5e-5, "optim": "adamw_8bit", "beta": 0.1, "max_length": 512}
    assert {name: settings[name] for name in expected} == expected
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 8
    assert settings["bf16"] != settings["fp16"]


def test_rate_and_length_come_from_the_model_in_hand(gpu, monkeypatch):
    """The embedded model on a GPU, whatever `.env` names, and a model that was loaded for thinking pairs."""
    embedded, other = Loaded(embedded_folder(), 512), Loaded("unsloth/Qwen3-4B-Thinking-2507", 1024)
    for named in ("", "embedded"):
        monkeypatch.setenv("DPO_MODEL", named)
        assert (dpo_settings(embedded)["learning_rate"], dpo_settings(embedded)["max_length"]) == (2e-4, 512)
        assert (dpo_settings(other)["learning_rate"], dpo_settings(other)["max_length"]) == (5e-5, 1024)
    # A model of one's own that began as the embedded one is another model.
    assert dpo_settings(Loaded(f"{embedded_folder()}-my-sft", 512))["learning_rate"] == 5e-5


def test_every_default_is_a_setting_of_trl(monkeypatch):
    for profile in PROFILES.values():
        monkeypatch.setattr("helpers.train.settings.current_profile", lambda profile=profile: profile)
        settings.check_settings(dpo_settings())


# ------------------------------------------------------------------------------------------------ run folders


def info(**changes) -> RunInfo:
    """Of a run; `changes` to its config, or to the info itself."""
    config = {"beta": 0.2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    config |= {"gradient_checkpointing": False, "output_dir": "a"} | changes.pop("config", {})
    values = {name: name for name in ("model", "profile", "base", "start", "reference", "machine")}
    values |= {"train_pairs": 1, "test_pairs": 1, "data": DataInfo("a", "b"), "versions": {}, "status": Status.RUNNING}
    return RunInfo(**values | {"config": config} | changes)


def test_a_run_that_differs_in_how_a_step_is_made_is_the_same_run():
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    assert resume.step_of(info(config=cut), info()) == cut
    assert resume.step_of(info(config=cut | {"beta": 0.3}), info()) is None
    assert resume.step_of(info(config=cut | {"gradient_accumulation_steps": 8}), info()) is None  # 16 pairs a step
    assert resume.step_of(info(config=cut, data=DataInfo("a", "other")), info()) is None
    assert resume.step_of(dataclasses.replace(info(), config={"beta": 0.2}), info()) is None
    assert resume.step_of(None, info()) is None


def test_only_what_changes_the_result_makes_another_run():
    same = [{"logging_steps": 1}, {"report_to": ["tensorboard"]}, {"a_setting_of_the_next_version": True}]
    assert [resume.differences(info(config=change), info()) for change in same] == [[], [], []]
    # What an older library did not have is at its default: no difference, until it is set.
    assert resume.differences(info(), info(config={"label_smoothing": 0.0})) == []
    assert resume.differences(info(), info(config={"label_smoothing": 0.1})) == ["label_smoothing None there, 0.1 now"]
    assert resume.differences(info(config={"beta": 0.3}), info()) == ["beta 0.3 there, 0.2 now"]
    assert resume.differences(info(base="x"), info()) == ["other base"]
    assert resume.differences(info(base_config="a"), info(base_config="b")) == ["other settings of the base"]
    assert resume.differences(info(), info(base_config="b")) == []  # an older run does not say
    assert resume.differences(info(data=DataInfo("a", "c")), info()) == ["other data"]
    assert resume.differences(info(start="x"), info()) == ["another adapter to start from"]
    assert resume.differences(info(start="x", end="start"), info()) == []  # its cell is run once more


def test_settings_that_change_the_result_are_settings():
    known = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert sorted(resume.RESULT_SETTINGS - known) == []


def test_only_complete_checkpoints_count(tmp_path, capsys):
    for step, content in ((2, b"whole"), (4, b"whole"), (10, b"cut")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(content)
        if step != 4:  # killed before the mark was written
            (folder / "complete.json").write_text('{"optimizer.pt": 5}')
    assert resume.last_complete(tmp_path).name == "checkpoint-2"
    out = capsys.readouterr().out
    assert "checkpoint-4 is incomplete" in out and "checkpoint-10 is incomplete" in out
    for name in ("checkpoint-20-copy", "checkpoint-best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-30").touch()
    assert resume.last_complete(tmp_path).name == "checkpoint-2"
    assert len(list(tmp_path.iterdir())) == 4  # what is not the run's is left


def test_second_ctrl_c_stops_at_once_and_the_handler_before_comes_back():
    before, checkpoints = signal.getsignal(signal.SIGINT), resume.Checkpoints(None)
    with checkpoints.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert checkpoints.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_left_alone_in_a_thread_and_in_one_of_several_processes(monkeypatch):
    handlers = []

    def listen() -> None:
        with resume.Checkpoints(None).listening():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    monkeypatch.setattr(resume, "processes", lambda: SimpleNamespace(num_processes=2))
    listen()
    assert handlers == [signal.getsignal(signal.SIGINT)] * 2


def test_model_without_adapter_is_refused(pairs, tmp_path):
    with pytest.raises(UserError, match="add_lora"):
        train_dpo(torch.nn.Linear(1, 1), None, *pairs, tmp_path)


def test_pairs_with_errors_are_refused_before_anything_is_trained(tokenizer):
    bad = load_pairs([{"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}] * 2)
    good = load_pairs([{"prompt": "3 + 3?", "chosen": "6", "rejected": "5"}])
    with pytest.raises(UserError, match=r"(?s)chosen and rejected are the same.*\.clean"):
        check_both(bad, good, tokenizer, 512, **RULE)
    with pytest.raises(UserError, match="chosen and rejected are the same"):
        check_both(good, bad, tokenizer, 512, **RULE)


# ------------------------------------------------------------------------------------------------ the reference

pytest_slow = pytest.mark.slow


def config(tmp_path, **settings) -> DPOConfig:
    values = dpo_settings() | {"report_to": "none", "save_strategy": "no", "disable_tqdm": True} | SHORT | settings
    return DPOConfig(output_dir=str(tmp_path / "trainer"), **values)


@pytest_slow
def test_step_zero_and_the_reference_in_the_step(base, pairs, tmp_path):
    """TRL's trainer as 03_train builds it: loss ln 2, margin 0, and its reference is the base model."""
    model, tokenizer = base
    expected = pair_logps(model, tokenizer, pairs[1])
    policy = helpers.add_lora(model, seed=0)
    try:
        trainer = helpers.DPOTrainer(
            policy, args=config(tmp_path), train_dataset=pairs[0], eval_dataset=pairs[1], processing_class=tokenizer
        )
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=0.001)
        assert metrics["eval_rewards/margins"] == pytest.approx(0, abs=0.001)
        got = [trainer.compute_ref_log_probs(policy, batch) for batch in trainer.get_eval_dataloader()]
        # bf16 rounds differently where the padding differs, by some tenths of a nat.
        for side, ours in ((0, expected.chosen), (1, expected.rejected)):
            assert torch.cat([pair[side] for pair in got]).double().tolist() == pytest.approx(ours.tolist(), rel=0.015)
    finally:
        strip(model)


@pytest_slow
def test_cached_reference_stays_the_base_while_the_policy_moves(base, pairs, cache, tmp_path):
    model, tokenizer = base
    expected = pair_logps(model, tokenizer, pairs[1], batch_size=4)
    policy = helpers.add_lora(model, seed=0)
    try:
        run = train_dpo(policy, tokenizer, *pairs, tmp_path / "run", **SHORT, learning_rate=5e-4)
    finally:
        strip(model)
    first = next(row for row in run.history if "loss" in row)
    # The reference was computed in batches of other rows, but by the same packed forward: equal to rounding.
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=0.005)
    assert float(first["rewards/margins"]) == pytest.approx(0, abs=0.01)
    assert run.held_out.chosen_reference.tolist() == pytest.approx(expected.chosen.tolist(), rel=0.01)
    assert (run.held_out.chosen_policy - run.held_out.chosen_reference).abs().mean() > 0.5  # the policy did move


@pytest_slow
def test_reference_cache_is_met_exactly_when_nothing_that_matters_changed(policy, pairs, cache, monkeypatch):
    policy, tokenizer = policy
    pairs = pairs[0].select(range(4))
    computed = []

    def counted(*args, **kwargs):
        computed.append(1)
        return pair_logps(*args, **kwargs)

    monkeypatch.setattr("helpers.model.logps.pair_logps", counted)

    def calls(model=policy, tokenizer=tokenizer, pairs=pairs, max_length=512) -> int:
        computed.clear()
        reference_logps(model, tokenizer, pairs, max_length=max_length)
        return len(computed)

    assert calls() == 1
    assert calls() == 0
    # Beta, learning rate and loss are no arguments at all. The seed only decides the fresh adapter's A matrices,
    # which change nothing while B is zero:
    for name, parameter in policy.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(-1.0)
    assert calls() == 0
    assert calls(max_length=256) == 1
    assert calls(pairs=pairs.select([0, 1, 3, 2])) == 1
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("You are a helpful", "You are a terse")
    assert calls(tokenizer=other) == 1
    other.chat_template = tokenizer.chat_template
    other.add_tokens(["<new>"])
    assert calls(tokenizer=other) == 1
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_B" in name)[0, 0] = 0.5
    assert calls() == 1  # another adapter
    with torch.no_grad():
        norm = policy.get_base_model().model.norm.weight
        before = norm[0].clone()
        norm[0] = 2 * before
        assert calls() == 1  # another model
        norm[0] = before
    assert calls() == 0
    for path in (cache / "reference").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert calls() == 1  # a half-written file is recognised


@pytest_slow
def test_micro_batches_agree(pairs, cache, tmp_path):
    """In fp32 the losses of two steps agree to 0.0005. (In bf16 rounding hides what this is about.)"""
    model, tokenizer = helpers.load_model("embedded")  # its own: to fp32 and back would round rotary frequencies
    policy = helpers.add_lora(model.float(), seed=0)
    initial = {name: value.clone() for name, value in get_peft_model_state_dict(policy).items()}
    reference = reference_logps(policy, tokenizer, pairs[0], max_length=512)
    losses = []
    for size in (2, 4, 8):
        set_peft_model_state_dict(policy, initial)
        settings = config(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            lr_scheduler_type="constant",
            warmup_steps=0,
            bf16=False,
        )
        trainer = make_trainer(policy, tokenizer, with_reference(pairs[0], reference), None, settings)
        trainer.train()
        losses.append([float(row["loss"]) for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 2 and losses[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] == pytest.approx(losses[0], abs=5e-4)
    assert losses[2] == pytest.approx(losses[0], abs=5e-4)


@pytest_slow
def test_trainer_that_could_not_be_made_leaves_the_policy_as_it_was(policy, pairs, cache, tmp_path, monkeypatch):
    policy, tokenizer = policy
    few = pairs[0].select(range(4))
    rows = with_reference(few, reference_logps(policy, tokenizer, few, max_length=512))
    made = []

    class Fails(trl.DPOTrainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)
            raise RuntimeError("out of memory")

    monkeypatch.setattr(trl, "DPOTrainer", Fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(policy, tokenizer, rows, None, config(tmp_path))
    assert made and list(policy.peft_config) == ["default"]
    monkeypatch.undo()
    make_trainer(policy, tokenizer, rows, None, config(tmp_path))


LOSSES = {
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "sigmoid+sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    "apo_zero": {"loss_type": "apo_zero"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
}


@pytest_slow
@pytest.mark.parametrize("loss", LOSSES)
def test_other_losses_train(policy, pairs, cache, tmp_path, loss):
    policy, tokenizer = policy
    few = pairs[0].select(range(4))
    reference = reference_logps(policy, tokenizer, few, max_length=512)
    settings = config(tmp_path, max_steps=2, gradient_accumulation_steps=1, warmup_steps=0, **LOSSES[loss])
    trainer = make_trainer(policy, tokenizer, with_reference(few, reference), None, settings)
    trainer.train()
    values = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    assert len(values) == 2 and all(math.isfinite(value) for value in values)
    assert any(value.any() for name, value in get_peft_model_state_dict(policy).items() if "lora_B" in name)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest_slow
def test_reference_of_an_sft_policy_is_the_sft_model_and_an_explicit_one_is_itself(
    sft_adapter, base, pairs, cache, tmp_path
):
    plain, tokenizer = base
    of_base = pair_logps(plain, tokenizer, pairs[1], batch_size=4)
    policy, _ = helpers.load_model(str(sft_adapter))
    of_sft = pair_logps(policy, tokenizer, pairs[1], batch_size=4)
    assert (of_sft.chosen - of_base.chosen).abs().mean() > 2  # SFT moved it, so the two can be told apart
    explicit = train_dpo(policy, tokenizer, *pairs, tmp_path / "explicit", ref_model=plain, **SHORT | {"max_steps": 1})
    implicit = train_dpo(policy, tokenizer, *pairs, tmp_path / "implicit", **SHORT | {"max_steps": 1})
    assert implicit.held_out.chosen_reference.tolist() == pytest.approx(of_sft.chosen.tolist(), rel=0.01)
    assert explicit.held_out.chosen_reference.tolist() == pytest.approx(of_base.chosen.tolist(), rel=0.01)
    assert losses(implicit)[0] == pytest.approx(math.log(2), abs=0.01)
    # beta times the distance of the policy from its reference: none, and some nats
    first = [next(row for row in run.history if "loss" in row) for run in (implicit, explicit)]
    assert abs(float(first[0]["rewards/chosen"])) < 0.03
    assert float(first[1]["rewards/chosen"]) > 0.1


@pytest_slow
def test_best_checkpoint_is_kept_and_early_stop_stops(policy, pairs, cache, tmp_path):
    """A learning rate that ruins the model: each evaluation is worse than the one before."""
    policy, tokenizer = policy
    settings = SHORT | {"max_steps": 6, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    run = train_dpo(
        policy, tokenizer, *pairs, tmp_path / "run", early_stopping=1, eval_steps=1, save_steps=1, **settings
    )
    held_out = [row["eval_loss"] for row in run.history if "eval_loss" in row]
    assert run.info.steps < 6
    assert held_out[-1] > min(held_out) + 0.05
    assert run.metrics["loss"] == pytest.approx(min(held_out), abs=0.02)


@pytest_slow
def test_full_disk_is_named_and_the_policy_put_back(policy, pairs, cache, tmp_path, monkeypatch):
    policy, tokenizer = policy
    initial = {name: value.clone() for name, value in get_peft_model_state_dict(policy).items()}

    def full(self, args, state, control, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.Checkpoints, "on_save", full)
    with pytest.raises(UserError, match="No space left on device.*checkpoint is kept.*train_dpo again"):
        train_dpo(policy, tokenizer, *pairs, tmp_path / "run", **SHORT | {"max_steps": 2, "save_steps": 1})
    assert all(torch.equal(value, initial[name]) for name, value in get_peft_model_state_dict(policy).items())


class TakeAllMemory(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.empty(1 << 50)


@pytest_slow
def test_out_of_memory_is_answered_with_what_each_change_saves(policy, pairs, cache, tmp_path, monkeypatch, capsys):
    policy, tokenizer = policy
    initial = {name: value.clone() for name, value in get_peft_model_state_dict(policy).items()}
    call = {"folder": tmp_path / "run"} | SHORT | {"max_steps": 1, "per_device_train_batch_size": 8}
    # Before a step: the machine has too little for what the estimate says.
    monkeypatch.setattr("helpers.train.job.free_memory", lambda device: 0.2e9)
    with pytest.raises(UserError, match=r"0\.2 GB are free(?s:.*)=True \(slower\): [0-9.]+ GB(?s:.*)size=4, grad"):
        train_dpo(policy, tokenizer, *pairs, **call)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    with pytest.raises(UserError, match="is out of memory"):
        Run.load(tmp_path / "run")
    # Near the limit it is tried, with a warning; a run that kept nothing is in nobody's way.
    needed = json.loads((tmp_path / "run" / "run.json").read_text())["memory_gb"]["needed"]
    monkeypatch.setattr("helpers.train.job.free_memory", lambda device: needed * 0.9e9)
    with pytest.raises(UserError, match="Out of memory(?s:.*)the same effective batch"):
        train_dpo(policy, tokenizer, *pairs, **call, beta=0.2, callbacks=[TakeAllMemory()])
    assert "It may not fit" in capsys.readouterr().out
    assert all(torch.equal(value, initial[name]) for name, value in get_peft_model_state_dict(policy).items())


@pytest_slow
def test_minutes_said_before_the_first_step_are_near_those_that_it_took(policy, cache, tmp_path, monkeypatch, capsys):
    """Twice those that were said at most, or half; the second run knows them from the cache, a third from nowhere."""
    policy, tokenizer = policy
    rows, said = load_pairs(), []

    def heard(*given):
        said.append((given[-1], time.monotonic()))
        return settings.what_will_happen(*given)

    monkeypatch.setattr(job, "what_will_happen", heard)
    call = (policy, tokenizer, rows.select(range(48)), rows.select(range(48, 60)))
    train_dpo(*call, tmp_path / "first")
    (seconds, began), ended = said[0], time.monotonic()
    assert 0.5 < (ended - began) / seconds < 2, (ended - began, seconds)
    # Private: the parts of a run that a second call is not to repeat.
    monkeypatch.setattr(dpo, "_score", lambda *_: pytest.fail("the log-probs are in the cache"))
    monkeypatch.setattr(dpo, "_train", lambda *_: pytest.fail("as far as this"))
    fresh = helpers.add_lora(policy.unload(), seed=0)
    with pytest.raises(BaseException, match="as far as this"):
        train_dpo(fresh, *call[1:], tmp_path / "second")
    assert said[1][0] == pytest.approx(seconds)
    monkeypatch.setattr("helpers.run.folder.machine", lambda: "another")
    with pytest.raises(BaseException, match="as far as this"):
        train_dpo(fresh, *call[1:], tmp_path / "third")
    assert said[2][0] is None and "how long is said after the first step" in capsys.readouterr().out


@pytest_slow
def test_tensorboard_where_it_is_installed(policy, pairs, cache, tmp_path):
    policy, tokenizer = policy
    settings = SHORT | {"max_steps": 1, "report_to": "tensorboard"}
    if importlib.util.find_spec("tensorboard") is None and importlib.util.find_spec("tensorboardX") is None:
        with pytest.raises(UserError, match="pip install tensorboard"):
            train_dpo(policy, tokenizer, *pairs, tmp_path / "run", **settings)
        return
    train_dpo(policy, tokenizer, *pairs, tmp_path / "run", **settings)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest_slow
def test_run_folder_is_complete_portable_and_loads_in_a_new_process(policy, pairs, cache, tmp_path, capsys):
    policy, tokenizer = policy
    folder = tmp_path / "run"
    run = train_dpo(policy, tokenizer, *pairs, folder, **SHORT)
    ahead, _ = capsys.readouterr().out.split("step    1 of 4")
    assert "16 pairs to train on, 4 steps of 4, learning rate 0.0002, " in ahead.splitlines()[-1]
    assert run.info.status == "finished" and run.info.steps == 4
    assert run.info.config["beta"] == 0.1 and run.info.versions["trl"]
    assert run.info.data.longest == helpers.check_pairs(pairs[0], tokenizer).longest
    assert {"accuracy", "accuracy_interval", "reference_accuracy", "train_seconds"} <= set(run.metrics)
    assert len(run.held_out) == 6 and len([row for row in run.history if "loss" in row]) == 4
    again = Run.load(folder)
    assert dataclasses.asdict(again) | {"held_out": 0} == dataclasses.asdict(run) | {"held_out": 0}
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".md"))
    assert str(Path.home()) not in text and str(tmp_path) not in text
    assert helpers.verdict(run).to_markdown() in (folder / "README.md").read_text()
    assert not (folder / "checkpoints").exists()

    code = f"""
from helpers import load_model, load_pairs
from helpers.model.logps import in_32_bits, pair_logps
model, tokenizer = load_model({str(run.adapter)!r})
with in_32_bits(model):  # as the held-out pairs are scored, also where training is in bf16
    logps = pair_logps(model, tokenizer, load_pairs().select(range(16, 22)), max_length=512, batch_size=4)
print("LOGPS", logps.chosen.tolist() + logps.rejected.tolist())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    loaded = json.loads(out.stdout.rpartition("LOGPS ")[2])
    before = run.held_out.chosen_policy.tolist() + run.held_out.rejected_policy.tolist()
    assert loaded == pytest.approx(before, abs=0.01)

    # Another adapter to start from is another run, also where only its seed differs.
    set_peft_model_state_dict(
        policy,
        {
            name: torch.zeros_like(value) if "lora_B" in name else -value
            for name, value in get_peft_model_state_dict(policy).items()
        },
    )
    with pytest.raises(UserError, match="another adapter to start from"):
        train_dpo(policy, tokenizer, *pairs, folder, **SHORT)
    set_peft_model_state_dict(policy, load_file(run.adapter / "adapter_model.safetensors"))

    # The same call does not train again, another one is refused, and nothing of the first is lost by `replace`.
    capsys.readouterr()
    assert train_dpo(policy, tokenizer, *pairs, folder, **SHORT).metrics == run.metrics
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="beta 0.1 there, 0.5 now.*replace=True"):
        train_dpo(policy, tokenizer, *pairs, folder, **SHORT, beta=0.5)
    set_aside(folder)
    assert Run.load(tmp_path / "run.old-1").metrics == run.metrics


class PressStop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest_slow
def test_ctrl_c_saves_restores_and_resumes(policy, pairs, cache, tmp_path, capsys):
    policy, tokenizer = policy
    fresh = {name: value.clone() for name, value in get_peft_model_state_dict(policy).items()}
    whole = train_dpo(policy, tokenizer, *pairs, tmp_path / "whole", **SHORT)
    final = {name: value.clone() for name, value in get_peft_model_state_dict(policy).items()}
    set_peft_model_state_dict(policy, fresh)
    with pytest.raises(KeyboardInterrupt):
        train_dpo(policy, tokenizer, *pairs, tmp_path / "run", **SHORT, callbacks=[PressStop()])
    assert "Stopped and saved at step 3 of 4" in capsys.readouterr().out
    assert all(torch.equal(value, fresh[name]) for name, value in get_peft_model_state_dict(policy).items())
    run = train_dpo(policy, tokenizer, *pairs, tmp_path / "run", **SHORT)
    assert "Resuming from step 3" in capsys.readouterr().out
    assert losses(run) == losses(whole)
    assert all(torch.equal(value, final[name]) for name, value in get_peft_model_state_dict(policy).items())


def losses(run: Run) -> list[float]:
    return [float(row["loss"]) for row in run.history if "loss" in row]


KILLED = """
import os, signal, sys
from helpers import *
from helpers import load_pairs
from transformers import TrainerCallback

folder, adapter, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

model, tokenizer = load_model(None if adapter == "fresh" else adapter)
if adapter == "fresh":
    model = add_lora(model, seed=0)
pairs = load_pairs()
train_dpo(
    model, tokenizer, pairs.select(range(16)), pairs.select(range(16, 22)), folder, max_steps=4, save_steps=2,
    eval_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
    callbacks=[Kill()],
)
"""


def run_process(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", KILLED, *args], capture_output=True, text=True, timeout=600)


@pytest_slow
@pytest.mark.parametrize("start", ["fresh", "sft"])
def test_killed_run_resumes_to_the_same_end(start, sft_adapter, tmp_path):
    """A real SIGKILL between two checkpoints; the resumed run has the losses and weights of one left alone."""
    adapter = "fresh" if start == "fresh" else str(sft_adapter)
    whole = run_process(str(tmp_path / "whole"), adapter, "-1")
    assert whole.returncode == 0, whole.stderr
    killed = run_process(str(tmp_path / "run"), adapter, "3")
    assert killed.returncode == -signal.SIGKILL
    resumed = run_process(str(tmp_path / "run"), adapter, "-1")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from step 2" in resumed.stdout
    one, other = Run.load(tmp_path / "whole"), Run.load(tmp_path / "run")
    assert len(losses(one)) == 4
    assert losses(other) == losses(one)
    assert losses(one)[0] == pytest.approx(math.log(2), abs=0.01)
    weights = [load_file(run.adapter / "adapter_model.safetensors") for run in (one, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    if start == "sft":
        before = load_file(sft_adapter / "adapter_model.safetensors")
        moved = [(value - before[name]).abs().max() for name, value in weights[1].items()]
        assert 0 < max(moved) < 0.01  # it went on from the SFT adapter, not from zero


@pytest.fixture(scope="module")
def sft_adapter(base, pairs, tmp_path_factory):
    """A real adapter from two steps of supervised fine-tuning with TRL."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = base
    policy = helpers.add_lora(model, seed=1)
    data = pairs[0].map(lambda row: {"messages": row["prompt"] + row["chosen"]}, remove_columns=pairs[0].column_names)
    folder = tmp_path_factory.mktemp("sft")
    args = SFTConfig(
        output_dir=str(folder / "trainer"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    SFTTrainer(policy, args=args, train_dataset=data, processing_class=tokenizer).train()
    policy.save_pretrained(folder / "adapter")
    strip(model)
    return folder / "adapter"

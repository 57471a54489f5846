"""A run that several processes share: the figures of one, killed and resumed, on one machine and on two."""

import itertools
import math
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

import helpers
from helpers import UserError, load_pairs, train_dpo
from helpers.data.render import IDS
from helpers.run.folder import Run
from helpers.train import processes

ROOT = Path(__file__).parent.parent.parent

# Two epochs of 21 pairs, 8 a step: the last step of each has 5, which no two processes share equally. 9 held-out pairs
# are three batches, two of one process and one of the other.
SCRIPT = """
import os, pathlib, signal, sys, time
from helpers import add_lora, load_model, load_pairs, train_dpo
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        while os.path.exists("wait"):
            time.sleep(0.1)

    def on_step_begin(self, args, state, control, **kwargs):
        ranks, _, step = os.environ.get("KILL", "-@-1").partition("@")
        if state.global_step == int(step) and os.environ.get("RANK", "0") in ranks:
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

model, tokenizer = load_model(sys.argv[1])
pairs = load_pairs()
train_dpo(
    add_lora(model.float()), tokenizer, pairs.select(range(21)), pairs.select(range(50, 59)), sys.argv[2],
    num_train_epochs=2, learning_rate=0.1, warmup_steps=0, logging_steps=1, bf16=False, callbacks=[Kill()],
)
"""


@pytest.fixture
def start(small, tmp_path):
    """Start the script with some arguments of a launcher (none: one process); returns the process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started = []

    def launch(*options: str, kill: str = "-@-1", by: str = "torch.distributed.run") -> subprocess.Popen:
        launcher = ["-m", by, *options] if options else []
        own = {"KILL": kill, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DPO_CACHE_DIR": str(tmp_path / "cache")}
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), str(small), str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | own,
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def one(small, tmp_path_factory) -> Run:
    """The run of the script in one process: this one."""
    pairs = load_pairs()
    model, tokenizer = helpers.load_model(str(small))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path_factory.mktemp("cache"))
        return train_dpo(
            helpers.add_lora(model.float()),
            tokenizer,
            pairs.select(range(21)),
            pairs.select(range(50, 59)),
            tmp_path_factory.mktemp("one") / "run",
            num_train_epochs=2,
            learning_rate=0.1,
            warmup_steps=0,
            logging_steps=1,
            bf16=False,
        )


def losses(run: Run) -> list[float]:
    return [row[name] for row in run.history for name in ("loss", "eval_loss") if name in row]


def same(run: Run, one: Run) -> None:
    assert len(losses(one)) == 9 and max(losses(one)) - min(losses(one)) > 0.02  # they move
    assert losses(run) == pytest.approx(losses(one), abs=2e-4)  # fp32: the order of a sum
    assert run.metrics["loss"] == pytest.approx(one.metrics["loss"], abs=2e-4)
    assert run.held_out.chosen_policy.tolist() == pytest.approx(one.held_out.chosen_policy.tolist(), abs=1e-2)
    weights, expected = (load_file(each.adapter / "adapter_model.safetensors") for each in (run, one))
    assert max((weights[name] - value).abs().max() for name, value in expected.items()) < 1e-2  # of 0.3


@pytest.mark.slow
def test_two_processes_train_as_one_one_of_them_writes_and_no_other_run_has_the_folder(start, one, tmp_path):
    (tmp_path / "wait").touch()
    process = start("--nproc_per_node", "2")
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and not (tmp_path / ".run.lock").exists():
        time.sleep(0.1)
    second = start()
    refused, _ = second.communicate(timeout=600)
    assert second.returncode and "UserError: Another run is training in" in refused, refused[-3000:]
    assert process.poll() is None
    (tmp_path / "wait").unlink()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-3000:]
    assert "2 processes share this run." in out and "print is in run.logs next to the run folder" in out
    run = Run.load(tmp_path / "run")
    same(run, one)
    assert out.count("step    1 of 6") == out.count("Reference log-probs of 30 pairs") == 1
    assert run.info.config == one.info.config and run.info.machine.startswith("2 x CPU")
    # What is logged is of all pairs; the last step of an epoch counts its batches alike in one process.
    rows = [[row for row in each.history if "loss" in row] for each in (run, one)]
    for step in (0, 1, 3, 4):
        for name in ("rewards/margins", "rewards/chosen", "logps/rejected", "num_tokens", "grad_norm"):
            assert rows[0][step][name] == pytest.approx(rows[1][step][name], rel=1e-3, abs=1e-4), (step, name)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "run", "script.py"]


@pytest.mark.slow
def test_killed_and_resumed_by_other_numbers_of_processes(start, one, tmp_path):
    both = start("--nproc_per_node", "2", kill="01@3")
    out, _ = both.communicate(timeout=600)
    assert both.returncode and "step    3 of 6" in out and "step    4 of 6" not in out
    alone = start(kill="0@5")
    out, _ = alone.communicate(timeout=600)
    assert alone.returncode == -9 and "Resuming from step 2" in out, out[-3000:]
    # Without GPUs --cpu would start one process; two for GPUs join on the CPU.
    by = "accelerate.commands.launch"
    last = start("--multi_gpu", "--num_processes", "2", "--num_machines", "1", by=by)
    out, _ = last.communicate(timeout=600)
    assert last.returncode == 0 and "Resuming from step 4" in out, out[-3000:]
    assert "2 processes share this run" in out
    same(Run.load(tmp_path / "run"), one)


@pytest.mark.slow
def test_two_machines_killed_and_resumed_and_the_dead_process_is_named(start, one, tmp_path):
    """Two agents of torchrun that find each other by c10d, each with one process, as on two machines."""

    def both(kill: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "run"]
        options = ["--nnodes", "2", "--nproc_per_node", "1", "--local_addr", "127.0.0.1", *place]
        agents = [start(*options, kill=kill) for _ in range(2)]
        outs = [agent.communicate(timeout=600)[0] for agent in agents]
        codes = [agent.wait() for agent in agents]
        assert all(codes) if "-1" not in kill else not any(codes), outs[0][-2000:] + outs[1][-2000:]
        return outs

    outs = both("1@3")
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 60
    assert any("step    3 of 6" in out for out in outs)
    assert any("print is in run.logs next to the run folder: process-1.txt" in out for out in outs)
    said = re.search(r"rank +: (\d+) .*\n +exitcode +: -9 ", "".join(outs))  # by torchrun
    assert said and said[1] == "1" and (tmp_path / "run.logs" / "process-1.txt").is_file()
    outs = both("-@-1")
    assert any("Resuming from step 2" in out for out in outs)
    same(Run.load(tmp_path / "run"), one)


# ------------------------------------------------------------------------------------------------ sharing


def number_of(monkeypatch, number: int) -> None:
    monkeypatch.setattr(processes, "processes", lambda: SimpleNamespace(num_processes=number))


def test_step_is_shared_exactly_or_refused_with_what_can_be(monkeypatch):
    for pairs, pieces, number in [(4, 2, 1), (4, 2, 2), (8, 1, 2), (4, 3, 2), (4, 2, 8), (16, 4, 4)]:
        number_of(monkeypatch, number)
        step = {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": pieces}
        share = processes.share_step(step | {"beta": 0.1})
        assert share["per_device_train_batch_size"] * share["gradient_accumulation_steps"] * number == pairs * pieces
        assert share["per_device_train_batch_size"] <= pairs and share["beta"] == 0.1
    number_of(monkeypatch, 3)
    with pytest.raises(
        UserError, match="8 pairs a step .* by 3 processes.* 1 or 2 or 4 or 8 processes, or take 6 or 9"
    ):
        processes.share_step({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})


def test_every_pair_is_in_one_batch_and_counts_the_same(tmp_path):
    """All numbers of pairs up to three steps: each epoch has each pair once, each process as many batches."""
    for rows, (size, pieces), number in itertools.product(range(1, 26), [(4, 1), (2, 2), (1, 3)], (1, 2, 3, 4)):
        step = size * pieces * number
        weight = [0.0] * rows
        batches = []
        for place in range(number):
            args = SimpleNamespace(
                train_batch_size=size,
                gradient_accumulation_steps=pieces,
                process_index=place,
                world_size=number,
                dataloader_drop_last=False,
            )
            dataset, state = range(rows), SimpleNamespace(global_step=0)
            trainer = SimpleNamespace(args=args, train_dataset=dataset, state=state)
            trainer.compute_loss = lambda model, inputs: 1.0
            processes.weigh_pairs(trainer)
            mine = processes._Shares(dataset, args, [7 * row % 5 for row in dataset])  # noqa: SLF001  (what is tested)
            every = list(mine)
            assert len(every) == len(mine) and all(every)
            batches.append(len(every))
            for index in range(math.ceil(rows / step)):
                of_step = every[index * pieces : (index + 1) * pieces]
                state.global_step, trainer.current_gradient_accumulation_steps = index, len(of_step)
                for batch in of_step:
                    inputs = {"input_ids": torch.zeros(2 * len(batch))}
                    loss = trainer.compute_loss(SimpleNamespace(training=True), inputs)
                    for row in batch:  # of the mean of its batch, of the step's batches, of the processes
                        weight[row] += loss / len(batch) / len(of_step) / number
        assert len(set(batches)) == 1
        whole = rows // step * step
        expected = [1 / step] * whole + [1 / max(rows - whole, 1)] * (rows - whole)
        assert weight == pytest.approx(expected), (rows, size, pieces, number)


def shared_batches(args, batches):
    """The batches that a process with these settings trains on, of those that accelerate gives it."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(**args, eval_batch_size=4),
        accelerator=SimpleNamespace(prepare_model=print),
        model=torch.nn.Linear(1, 1),
        eval_dataset=None,
        train_dataset=Dataset.from_dict({name: [[1]] * 12 for name in IDS}),
        callback_handler=SimpleNamespace(callbacks=[]),
        training_step=print,
        prediction_step=print,
        get_train_dataloader=lambda: SimpleNamespace(batch_sampler=batches),
    )
    processes.share_steps(trainer)
    return trainer.get_train_dataloader().batch_sampler


def test_processes_get_about_as_many_tokens_each():
    """Steps of 8 pairs, of 100 to 600 tokens: at random two shares are a quarter of their mean apart."""
    drawn = random.Random(0)
    tokens = [drawn.randint(100, 600) for _ in range(800)]
    apart, batches = [], []
    for place in range(2):
        args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=1, process_index=place, world_size=2)
        batches.append(list(processes._Shares(range(800), args, tokens)))  # noqa: SLF001  (what is tested)
    for one, other in zip(*batches, strict=True):
        shares = [sum(tokens[pair] for pair in batch) for batch in (one, other)]
        apart.append(abs(shares[0] - shares[1]) / fmean(shares))
    assert fmean(apart) < 0.1


def test_batches_of_a_last_step_that_are_not_full_are_trained_on():
    """12 pairs, 16 a step: each of two processes has two batches of three. accelerate expects four in all but one."""
    trained = []
    for place in range(2):
        part = BatchSamplerShard(BatchSampler(range(12), 4, drop_last=False), 2, place)
        args = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "process_index": place, "world_size": 2}
        trained += shared_batches(args, part)
    assert [len(batch) for batch in trained] == [3] * 4 and sorted(sum(trained, [])) == list(range(12))


def test_last_step_whose_rest_is_dropped_is_left_as_it_is(monkeypatch):
    """21 pairs, 8 a step in batches of 4: of the last 5 one is dropped, and the batch of 4 is the whole step."""
    args = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "process_index": 0, "world_size": 1}
    for drop in (True, False):
        trainer = SimpleNamespace(args=SimpleNamespace(**args, dataloader_drop_last=drop), train_dataset=range(21))
        trainer.compute_loss = print
        processes.weigh_pairs(trainer)
        assert (trainer.compute_loss is print) == drop


def test_one_process_that_a_launcher_started_has_all_batches():
    args = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "process_index": 0, "world_size": 1}
    batches = BatchSampler(range(12), 4, drop_last=False)
    assert shared_batches(args, batches) is batches


def test_processes_that_were_not_joined_are_refused(monkeypatch):
    assert processes.processes().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, and this one knows of 1. Use torchrun"):
        processes.processes()


def test_processes_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "gather_object", lambda facts: [*facts, {"model": "a", "adapter": "other"}])
    with pytest.raises(UserError, match="different values for adapter.*same seed"):
        processes.check_alike(model="a", adapter="b")

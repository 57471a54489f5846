"""Losses compared: python benchmarks/losses.py --processes 12 --out benchmarks/results/losses.json

The embedded model, LoRA of rank 16, one epoch of the 360 bundled training pairs as 03 splits them (120 held out),
learning rate 2e-4, 8 pairs a step, cosine schedule, bf16: what benchmarks/beta.py trains with, for every loss. Seven
losses by `train_dpo` with one cached reference; SimPO, ORPO and KTO by TRL's own trainers, KTO on the sides without
their pairing. Each at three values of its own strength and three seeds. Then, at each loss's middle strength, with 10
and 30 percent of the training labels exchanged; the held-out ones stay right.

Every run is measured alike, whatever trained it: accuracy and changes of held-out pairs by log-ratio against the base
model, in 32 bits by plain transformers and PEFT; two sampled replies to each held-out prompt for the KL (as in
benchmarks/beta.py), their length, and the share that ends.

`--alone` measures how long a step takes, on one epoch of 64 pairs for each loss in turn, with the machine to itself:
`train_dpo` has its reference cached and computes each prompt once, TRL's trainers run as they come.

`--processes` share the runs on one machine. A finished run is kept in `--folder`, and the same command goes on after an
interruption; with `--minutes` no run is begun later. `--quick` tries every loss for two steps. The last line is one
JSON object: the means over seeds.
"""

import argparse
import gc
import json
import math
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

SEEDS, EXCHANGED, STEP, ALONE = (0, 1, 2), (0.0, 0.1, 0.3), 8, 64
FIGURES = ("accuracy", "log_ratio_gap", "kl", "chosen_per_token", "rejected_per_token", "reply_tokens", "ended")


class Loss(NamedTuple):
    """A loss, and the values of its own strength that are tried; the middle one meets exchanged labels."""

    trainer: str  # "dpo" is train_dpo, the others are TRL's
    strength: str  # what is varied
    values: tuple[float, float, float]
    settings: Callable[[float], dict[str, Any]]


def by_beta(loss_type: str, *values: float) -> Loss:
    return Loss("dpo", "beta", values, lambda beta: {"loss_type": loss_type, "beta": beta})


# "Ranges" are those in which Meng et al. 2024 (SimPO, arXiv 2405.14734, appendix) look for each method's best.
LOSSES = {
    # Rafailov et al. 2023 draw 0.05 to 5 and take 0.1, for summaries 0.5 (figure 2, section 6).
    "sigmoid": by_beta("sigmoid", 0.05, 0.1, 0.5),
    # Lambert et al. 2024 (Tulu 3) take 5. Log-ratios are per token here, some forty times smaller.
    "sigmoid_norm": by_beta("sigmoid_norm", 2, 5, 10),
    # It aims at a gap of 1 / (2 beta) a token: 5 nats and 1 (both in the ranges), and 0.25, which these runs can reach.
    "ipo": by_beta("ipo", 0.1, 0.5, 2),
    # As sigmoid: both see beta times the gap. A pair is done at 20, 10 and 2 nats.
    "hinge": by_beta("hinge", 0.05, 0.1, 0.5),
    # Chowdhury et al. 2024 correct for an assumed share of wrong labels. 0.2 is between the two that are tried.
    "robust": Loss(
        "dpo",
        "label_smoothing",
        (0.1, 0.2, 0.3),
        lambda share: {"loss_type": "robust", "beta": 0.1, "label_smoothing": share},
    ),
    # As sigmoid: each side sees beta times its log-ratio. TRL's default is 0.1.
    "apo_zero": by_beta("apo_zero", 0.05, 0.1, 0.5),
    # Pang et al. 2024 take 1; 0.1 is the weight in this project's notebooks.
    "sigmoid + sft": Loss(
        "dpo",
        "weight of sft",
        (0.1, 0.3, 1.0),
        lambda weight: {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight], "beta": 0.1},
    ),
    # The ranges: beta 2 to 2.5, gamma 0.3 to 1.6.
    "simpo": Loss(
        "cpo",
        "gamma",
        (0.3, 1.0, 1.6),
        lambda gamma: {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": gamma},
    ),
    # The ranges: 0.1 to 2. Hong et al. 2024 take 0.1 to 0.25; TRL calls this lambda beta.
    "orpo": Loss("orpo", "lambda", (0.1, 0.5, 2.0), lambda weight: {"beta": weight}),
    # The ranges; 0.1 is TRL's default and what Ethayarajh et al. 2024 take.
    "kto": Loss("kto", "beta", (0.01, 0.05, 0.1), lambda beta: {"beta": beta}),
}


def plan(quick: bool, names: list[str]) -> list[dict]:
    """The runs, in the order in which they are worth having: all strengths of a seed first, exchanged labels last."""
    runs = []
    for exchanged, seed, name in product(EXCHANGED[:1] if quick else EXCHANGED, SEEDS[:1] if quick else SEEDS, names):
        values = LOSSES[name].values
        strengths = values[1:2] if quick or exchanged else values
        runs += [{"loss": name, "strength": one, "exchanged": exchanged, "seed": seed} for one in strengths]
    return runs


def place(folder: Path, run: dict) -> Path:
    return folder / ("-".join(str(value).replace(" ", "") for value in run.values()) + ".json")


def exchange(pairs, share: float, seed: int):
    """`pairs` with chosen and rejected exchanged in a share of them; what 10 percent exchange, 30 do too."""
    from datasets import Dataset

    drawn = set(random.Random(seed).sample(range(len(pairs)), len(pairs))[: round(share * len(pairs))])
    rows = list(pairs)
    for i in drawn:
        rows[i] |= {"chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]}
    return Dataset.from_list(rows, features=pairs.features)


def texts(pairs, tokenizer):
    """What was checked, as text: the trainers of SimPO and ORPO read no ids.

    The template's line break after the end of the turn is left out, or they would put a second end behind it.
    """
    from datasets import Dataset

    from helpers import tokenize_pairs

    sides = ("prompt", "chosen", "rejected")
    rows = [{side: tokenizer.decode(row[f"{side}_ids"]) for side in sides} for row in tokenize_pairs(pairs, tokenizer)]
    for row in rows:
        row |= {side: row[side].removesuffix("\n") for side in sides[1:]}
    return Dataset.from_list(rows)


def by_trl(kind: str, model, tokenizer, train, seed: int, folder: str, steps: int, settings: dict) -> tuple[float, int]:
    """Train by TRL's trainer for this `kind` of loss; returns the seconds of its steps, and their number."""
    import trl
    from trl.data_utils import unpair_preference_dataset
    from trl.experimental import cpo, orpo

    from helpers import dpo_settings
    from helpers.patches.fused_lm_head import own_forward

    config, trainer, size = {
        "cpo": (cpo.CPOConfig, cpo.CPOTrainer, STEP),
        "orpo": (orpo.ORPOConfig, orpo.ORPOTrainer, STEP),
        "kto": (trl.KTOConfig, trl.KTOTrainer, 2 * STEP),  # rows, of which two are a pair
    }[kind]
    shared = """learning_rate num_train_epochs lr_scheduler_type warmup_steps weight_decay optim bf16 max_length
    logging_steps logging_first_step report_to""".split()
    values = {name: value for name, value in dpo_settings(model).items() if name in shared}
    values |= {"seed": seed, "per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "max_steps": steps}
    values |= {"gradient_checkpointing": False, "max_grad_norm": 1.0}  # Unsloth's own configs have other defaults
    values |= {"output_dir": folder, "save_strategy": "no", "disable_tqdm": True} | settings
    if kind == "kto":
        # In any order: TRL goes through them one after the other, and estimates the KL among those of a batch.
        data = unpair_preference_dataset(train.select_columns(["prompt", "chosen", "rejected"])).shuffle(seed=seed)
        values["train_sampling_strategy"] = "sequential"
    else:
        data = texts(train, tokenizer)
    with own_forward(model), own_forward(model.get_base_model()):
        made = trainer(model, args=config(**values), train_dataset=data, processing_class=tokenizer)
        began = time.monotonic()
        made.train()
        seconds = time.monotonic() - began
    return seconds, made.state.global_step


def by_train_dpo(model, tokenizer, train, test, seed: int, folder: str, steps: int, settings: dict):
    from helpers import train_dpo

    values = {"seed": seed, "per_device_train_batch_size": STEP, "gradient_accumulation_steps": 1, "max_steps": steps}
    values |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False} | settings
    values |= {"gradient_checkpointing": False}
    run = train_dpo(model, tokenizer, train, test, folder, **values)
    return run.metrics["train_seconds"], run.info.steps


class Bench:
    """One model with its pairs and its reference, on which run after run is trained and measured."""

    def __init__(self, name: str, pairs: int, held_out: int, prompts: int, new_tokens: int):
        from helpers import load_model, load_pairs, pair_logps, split_pairs
        from transformers import AutoModelForCausalLM  # isort: skip  (after Unsloth, which helpers imports)
        import torch

        self.model, self.tokenizer = load_model(name)
        split = split_pairs(load_pairs())
        self.train, self.test = split["train"].select(range(pairs)), split["test"].select(range(held_out))
        self.sampling = {"prompts": list(self.test)[:prompts], "max_new_tokens": new_tokens, "batch_size": 2 * prompts}
        path = self.model.config.name_or_path
        self.plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(self.model.device)
        self.reference = pair_logps(self.plain, self.tokenizer, self.test)

    def replies_of(self, replies) -> dict[str, float]:
        from helpers.model.generate import repetition

        tokens, ended = [len(one.ids) for one in replies], [one.ended for one in replies]
        repeated = [repetition(one.ids) for one in replies]
        names = ("reply_tokens", "ended", "repetition")
        return {name: sum(part) / len(replies) for name, part in zip(names, (tokens, ended, repeated), strict=True)}

    def at_start(self) -> dict[str, float]:
        """How the reference's own replies look."""
        from helpers.model.logps import sample_twice

        return self.replies_of(sample_twice(self.model, self.tokenizer, **self.sampling, seed=0))

    def run(self, run: dict, steps: int = -1) -> dict:
        """`run` with what was measured, or with what failed."""
        from helpers import add_lora

        seed, model = run["seed"], add_lora(self.model, seed=run["seed"])
        try:
            with tempfile.TemporaryDirectory() as folder:
                done = self.trained(model, run, folder, steps)
                found = {"steps": done[1]} | self.measure(model, seed, Path(folder))
            if not math.isfinite(found["kl"]):
                raise FloatingPointError("the KL is not a number")
            return run | {"status": "finished"} | found
        except Exception as error:  # the other losses go on
            return run | {"status": f"failed: {type(error).__name__}: {error}"[:500]}
        finally:
            model.unload()
            del model
            gc.collect()

    def trained(self, model, run: dict, folder: str, steps: int) -> tuple[float, int]:
        """Train `model`; the seconds of the steps, and their number."""
        loss, seed = LOSSES[run["loss"]], run["seed"]
        train = exchange(self.train, run["exchanged"], seed)
        call = (seed, folder, steps, loss.settings(run["strength"]))
        if loss.trainer == "dpo":
            return by_train_dpo(model, self.tokenizer, train, self.test, *call)
        return by_trl(loss.trainer, model, self.tokenizer, train, *call)

    def step_seconds(self, run: dict) -> float:
        """Seconds a step, from one epoch of `ALONE` pairs, after a step that warms up."""
        from helpers import add_lora

        for steps in (1, ALONE // STEP):
            model = add_lora(self.model, seed=run["seed"])
            with tempfile.TemporaryDirectory() as folder:
                seconds, done = self.trained(model, run, folder, steps)
            model.unload()
            del model
            gc.collect()
        return seconds / done

    def measure(self, model, seed: int, folder: Path) -> dict:
        """Held-out pairs by log-ratio in 32 bits, and the KL with two sampled replies to each prompt."""
        from peft import PeftModel

        from helpers import pair_logps
        from helpers.model.logps import sampled_kl
        from helpers.run.metrics import held_out_table, preference_metrics

        model.save_pretrained(folder / "adapter")
        plain = PeftModel.from_pretrained(self.plain, str(folder / "adapter"))
        table = held_out_table(self.test, self.reference, pair_logps(plain, self.tokenizer, self.test))
        plain.unload()
        metrics = preference_metrics(table, beta=1.0)  # of which none is taken that beta is in
        found = {name: metrics[name] for name in ("accuracy", "log_ratio_gap", "chosen_change", "rejected_change")}
        for side in ("chosen", "rejected"):
            change = (table[f"{side}_policy"] - table[f"{side}_reference"]) / table[f"{side}_tokens"]
            found[f"{side}_per_token"] = float(change.mean())
        kl = sampled_kl(model, self.tokenizer, **self.sampling, seed=seed)
        found |= {"kl": kl.kl, "kl_error": kl.error} | self.replies_of(kl.replies)
        rounded = {name: round(value, 4) for name, value in found.items()}
        return rounded | {"right": "".join("01"[gap > 0] for gap in table.log_ratio_gap)}


def work(args: argparse.Namespace, runs: list[dict]) -> None:
    """Train and measure what is not finished of this process's share of the `runs`."""
    began, mine = time.monotonic(), runs[args.share :: args.processes]
    from helpers.common import write_json  # which imports Unsloth: a part of the minutes

    bench = Bench(args.model, args.pairs, args.held_out, args.prompts, args.new_tokens)
    if args.share == 0 and not (args.folder / "reference.json").exists():
        write_json(args.folder / "reference.json", bench.at_start())
    for run in mine:
        path = place(args.folder, run)
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished":
            continue
        if time.monotonic() - began > 60 * args.minutes:
            break
        row = bench.run(run, args.steps)
        print(json.dumps(row), flush=True)
        write_json(path, row)


def alone(args: argparse.Namespace) -> None:
    """Seconds a step of each loss, one after the other with the machine to itself, into a result that is there."""
    from helpers.common import write_json  # first: it imports Unsloth
    from helpers.run.folder import machine, versions

    result = json.loads(args.out.read_text(encoding="utf-8"))
    bench = Bench(args.model, ALONE, 8, 2, 8)
    seconds = {run["loss"]: round(bench.step_seconds(run), 3) for run in plan(True, args.losses)}
    how = f"python benchmarks/losses.py --alone --out {args.out.name}"
    result["alone"] = {"command": how, "machine": machine(), "versions": versions(), "step_seconds": seconds}
    write_json(args.out, result)
    print(json.dumps(result["alone"]))


def summary(rows: list[dict]) -> list[dict]:
    """A row for each loss, strength and share of exchanged labels: [mean over seeds, half of its 95% interval]."""
    from helpers.run.metrics import seed_interval

    table, keys = [], ("loss", "strength", "exchanged")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        of_seeds = [row for row in rows if tuple(row[name] for name in keys) == key and row["status"] == "finished"]
        line = dict(zip(keys, key, strict=True)) | {"seeds": len(of_seeds)}
        for name in FIGURES if of_seeds else ():
            values = [row[name] for row in of_seeds]
            line[name] = [round(sum(values) / len(values), 4)]
            line[name] += [round(seed_interval(values), 4)] if len(values) > 1 else [None]
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--processes", type=int, default=1, help="that share the runs on one machine")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later")
    parser.add_argument("--quick", action="store_true", help="each loss once, two steps, few pairs")
    parser.add_argument("--model", default="embedded", help="or a folder")
    parser.add_argument("--folder", type=Path, help="of the runs; it is kept. outputs/losses if left out")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--alone", action="store_true", help="measure only how long a step takes, into --out")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the same settings and 16-bit weights on a GPU too
    size = (2, 16, 8, 2, 8) if args.quick else (-1, 360, 120, 120, 128)
    args.steps, args.pairs, args.held_out, args.prompts, args.new_tokens = size
    args.folder = args.folder or Path("outputs/losses_quick" if args.quick else "outputs/losses")
    runs = plan(args.quick, args.losses)
    if args.alone:
        if not args.out:
            parser.error("--alone writes into the result of the runs: name its file by --out.")
        alone(args)
        return
    if args.share is not None:
        work(args, runs)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes))}
    workers = []
    for share in range(args.processes):
        with (args.folder / f"process-{share}.log").open("a") as log:
            command = [sys.executable, *sys.argv, "--share", str(share)]
            workers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | threads))
    codes = [worker.wait() for worker in workers]
    from helpers.common import write_json
    from helpers.run.folder import machine, versions

    rows = [json.loads(path.read_text(encoding="utf-8")) for run in runs if (path := place(args.folder, run)).exists()]
    reference = args.folder / "reference.json"
    result = {
        "command": shlex.join(["python", "benchmarks/losses.py", *(["--quick"] if args.quick else [])]),
        "machine": machine(),
        "versions": versions(),
        "processes": args.processes,
        "planned": len(runs),
        "held_out": args.held_out,
        "strengths": {name: loss.strength for name, loss in LOSSES.items()},
        "reference": json.loads(reference.read_text(encoding="utf-8")) if reference.exists() else None,
        "runs": rows,
    }
    if args.out:
        write_json(args.out, result)
    finished = sum(row["status"] == "finished" for row in rows)
    failed = [place(Path(), row).stem + ": " + row["status"] for row in rows if row["status"] != "finished"]
    print(json.dumps({"finished": finished, "planned": len(runs), "failed": failed, "means": summary(rows)}))
    if any(codes) or finished < len(runs):
        where = f"what each process said is in {args.folder.name}/process-*.log"
        raise SystemExit(f"{finished} of {len(runs)} runs are finished; {where}. The same command goes on.")


if __name__ == "__main__":
    main()

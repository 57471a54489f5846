"""Which learning rate moves a policy in how many steps, or with how many pairs: python benchmarks/learning_rate.py

The embedded model, LoRA of rank 16 and alpha 16, beta 0.1, 8 pairs a step from the 360 bundled training pairs (45 steps
are an epoch), cosine schedule; 120 pairs are held out. Seven rates, 24, 90 and 360 steps, three seeds. For each run:
log-ratio gap of the held-out pairs as training computes it (bf16 on a GPU), the same in 32 bits with accuracy and the
changes of either side, and the KL of sampled replies. `--processes 8` share the runs; after an interruption the same
command goes on.

`--pairs 60 180 360 --epochs 1 3` asks for so many pairs and epochs in place of steps; each seed draws its own pairs
from the 360.

The last line is one JSON object: for each rate and number of pairs and steps the mean over seeds and half of its 95
percent interval (Student's t).
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the same settings and 16-bit weights on a GPU too

RATES = (5e-6, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
STEPS = (24, 90, 360)
BETA, TRAIN, STEP, HELD_OUT, PROMPTS, NEW_TOKENS = 0.1, 360, 8, 120, 32, 64
KEYS = ("pairs", "steps", "rate")
FIGURES = ("gap", "accuracy", "kl", "chosen_change", "rejected_change", "gap_as_trained")


def bundled(pairs: int = TRAIN, seed: int = 0):
    """So many of the training pairs, as the seed draws them, and the held-out ones."""
    from helpers import load_pairs, split_pairs

    split = split_pairs(load_pairs())
    drawn = sorted(random.Random(seed).sample(range(TRAIN), pairs))
    return split["train"].select(drawn), split["test"].select(range(HELD_OUT))


def place(folder: Path, run: dict) -> Path:
    return folder / f"{run['pairs']}-{run['steps']}-{run['rate']:g}-{run['seed']}"


def train(folder: Path, runs: list[dict]) -> None:
    from helpers import load_model, sweep_beta

    model, tokenizer = load_model("embedded")
    sampling = {"prompts": PROMPTS, "max_new_tokens": NEW_TOKENS, "betas": (BETA,)}
    for run in runs:
        settings = {"learning_rate": run["rate"], "max_steps": run["steps"], "save_strategy": "no"}
        settings |= {"per_device_train_batch_size": STEP, "gradient_accumulation_steps": 1}
        pairs = bundled(run["pairs"], run["seed"])
        sweep_beta(model, tokenizer, *pairs, place(folder, run), seeds=(run["seed"],), **sampling, **settings)


def score(folder: Path, runs: list[dict]) -> list[dict]:
    """A row for each run, its held-out pairs scored in 32 bits by plain transformers and PEFT."""
    from helpers.model.embedded import embedded_model
    from helpers.model.load import load_tokenizer
    from helpers.model.logps import pair_logps
    from helpers.run.metrics import held_out_table, preference_metrics
    from helpers.train.sweep import Sweep  # isort: skip
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).to(device)
    tokenizer, test = load_tokenizer("embedded"), bundled()[1]
    reference = pair_logps(base, tokenizer, test)
    rows = []
    for run in runs:
        sweep = Sweep.load(place(folder, run))
        policy = PeftModel.from_pretrained(base, str(sweep.run(BETA, run["seed"]).adapter))
        table = held_out_table(test, reference, pair_logps(policy, tokenizer, test))
        base = policy.unload()
        found = preference_metrics(table, BETA)
        row = sweep.table.iloc[0]
        rows.append(run | {"gap": found["log_ratio_gap"], "kl": row.kl})
        rows[-1] |= {name: found[name] for name in ("accuracy", "chosen_change", "rejected_change")}
        rows[-1] |= {"gap_as_trained": row.log_ratio_gap, "seconds": row.train_seconds, "ended": row.ended}
    return rows


def summary(rows: list[dict]) -> list[dict]:
    from helpers.run.metrics import seed_interval

    table = []
    for key in sorted({tuple(row[name] for name in KEYS) for row in rows}):
        of_seeds = [row for row in rows if tuple(row[name] for name in KEYS) == key]
        line = dict(zip(KEYS, key, strict=True)) | {"seeds": len(of_seeds)}
        for name in FIGURES:
            values = [row[name] for row in of_seeds]
            half = seed_interval(values) if len(values) > 1 else None
            line[name] = [round(mean(values), 4), half and round(half, 4)]
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--pairs", type=int, nargs="+", default=[TRAIN], help=f"to train on, {TRAIN} at most")
    parser.add_argument("--epochs", type=int, nargs="+", help="in place of --steps")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--processes", type=int, default=1, help="that share the runs on one machine")
    parser.add_argument("--folder", type=Path, default=Path("outputs/learning_rate"), help="of the runs; it is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = []
    for pairs, length, rate, seed in product(args.pairs, args.epochs or args.steps, args.rates, range(args.seeds)):
        steps = length * math.ceil(pairs / STEP) if args.epochs else length
        runs.append({"pairs": pairs, "steps": steps, "rate": rate, "seed": seed})
    runs.sort(key=lambda run: -run["steps"])  # the longest ones first
    if args.share is not None:
        train(args.folder, runs[args.share :: args.processes])
        return
    command = [sys.executable, *sys.argv, "--share"]
    workers = [subprocess.Popen([*command, str(share)]) for share in range(args.processes)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("A process failed; what it said is above. The same command goes on.")
    from helpers.common import write_json
    from helpers.run.folder import machine, versions

    rows = score(args.folder, runs)
    result = {"machine": machine(), "versions": versions(), "table": summary(rows), "runs": rows}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result["table"]))


if __name__ == "__main__":
    main()

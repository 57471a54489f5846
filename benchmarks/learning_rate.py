"""Which learning rate moves a policy in how many steps: python benchmarks/learning_rate.py --processes 8

The embedded model, LoRA of rank 16 and alpha 16, beta 0.1, 8 pairs a step from the 360 bundled training pairs (45 steps
are an epoch), cosine schedule; 120 pairs are held out. Seven rates, 24, 90 and 360 steps, three seeds. For each run:
log-ratio gap of the held-out pairs as training computes it (bf16 on a GPU), the same in 32 bits with accuracy and the
changes of either side, and the KL of sampled replies. `--processes` share the runs; after an interruption the same
command goes on.

The last line is one JSON object: for each rate and number of steps the mean over seeds and half of its 95 percent
interval (Student's t).
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the same settings and 16-bit weights on a GPU too

RATES = (5e-6, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
STEPS = (24, 90, 360)
BETA, TRAIN, HELD_OUT, PROMPTS, NEW_TOKENS = 0.1, 360, 120, 32, 64
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 percent point for so many seeds
FIGURES = ("gap", "accuracy", "kl", "chosen_change", "rejected_change", "gap_as_trained")


def bundled():
    from helpers import load_pairs, split_pairs

    pairs = split_pairs(load_pairs())
    return pairs["train"].select(range(TRAIN)), pairs["test"].select(range(HELD_OUT))


def train(folder: Path, runs: list[tuple[int, float]], seeds: int) -> None:
    from helpers import load_model, sweep_beta

    model, tokenizer = load_model("embedded")
    sampling = {"prompts": PROMPTS, "max_new_tokens": NEW_TOKENS}
    for steps, rate in runs:
        place = folder / f"{steps}-{rate:g}"
        settings = {"learning_rate": rate, "max_steps": steps, "save_strategy": "no"}
        settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        sweep_beta(model, tokenizer, *bundled(), place, betas=(BETA,), seeds=range(seeds), **sampling, **settings)


def score(folder: Path, runs: list[tuple[int, float]], seeds: int) -> list[dict]:
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
    for steps, rate in runs:
        sweep = Sweep.load(folder / f"{steps}-{rate:g}")
        for seed in range(seeds):
            policy = PeftModel.from_pretrained(base, str(sweep.run(BETA, seed).adapter))
            table = held_out_table(test, reference, pair_logps(policy, tokenizer, test))
            base = policy.unload()
            found = preference_metrics(table, BETA)
            row = sweep.table[sweep.table.seed == seed].iloc[0]
            rows.append({"rate": rate, "steps": steps, "seed": seed, "gap": found["log_ratio_gap"], "kl": row.kl})
            rows[-1] |= {name: found[name] for name in ("accuracy", "chosen_change", "rejected_change")}
            rows[-1] |= {"gap_as_trained": row.log_ratio_gap, "seconds": row.train_seconds, "ended": row.ended}
    return rows


def summary(rows: list[dict]) -> list[dict]:
    table = []
    for steps, rate in sorted({(row["steps"], row["rate"]) for row in rows}):
        of_seeds = [row for row in rows if (row["steps"], row["rate"]) == (steps, rate)]
        line = {"rate": rate, "steps": steps, "seeds": len(of_seeds)}
        for name in FIGURES:
            values = [row[name] for row in of_seeds]
            half = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            line[name] = [round(mean(values), 4), half and round(half, 4)]
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, *STUDENT), help="number of seeds")
    parser.add_argument("--processes", type=int, default=1, help="that share the runs on one machine")
    parser.add_argument("--folder", type=Path, default=Path("outputs/learning_rate"), help="of the runs; it is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = [(steps, rate) for steps in sorted(args.steps, reverse=True) for rate in args.rates]
    if args.share is not None:
        train(args.folder, runs[args.share :: args.processes], args.seeds)
        return
    command = [sys.executable, *sys.argv, "--share"]
    workers = [subprocess.Popen([*command, str(share)]) for share in range(args.processes)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("A process failed; what it said stands above. The same command goes on.")
    from helpers.common import write_json
    from helpers.run.folder import machine, versions

    rows = score(args.folder, runs, args.seeds)
    result = {"machine": machine(), "versions": versions(), "table": summary(rows), "runs": rows}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result["table"]))


if __name__ == "__main__":
    main()

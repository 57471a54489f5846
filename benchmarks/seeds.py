"""Held-out preference accuracy of 03_train over three seeds: python benchmarks/seeds.py --folder FOLDER

Trains the embedded model three times with the settings of `03_train`, each from a fresh adapter. Like the page it
evaluates after the twelfth step and the last; `--every 1` evaluates after each, which shows what `diagnose` says of
such a run however often it looks. The pages were made on a CPU without bf16, which trains in 32 bits; one that has it
does so with UNSLOTH_CPU_BF16=0. About twenty minutes on two CPU cores; `--processes 3` trains the seeds side by side,
on a GPU in three minutes. Finished seeds are kept in FOLDER. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the settings of the page on any machine

SEEDS = (0, 1, 2)


def train(folder: Path, seed: int, every: int) -> None:
    from helpers import add_lora, load_model, load_pairs, split_pairs, train_dpo
    from helpers.common import write_json
    from helpers.run.folder import machine, versions
    from helpers.run.metrics import accuracy_by

    pairs = split_pairs(load_pairs())
    model, tokenizer = load_model("embedded")
    data = pairs["train"].select(range(192)), pairs["test"]  # as in the notebook
    settings = {"seed": seed, "eval_steps": every, "save_steps": every}
    run = train_dpo(add_lora(model, seed=seed), tokenizer, *data, folder / f"run-{seed}", **settings)
    result = {"seed": seed, "steps": run.info.steps} | run.metrics | {"history": run.history}
    by_flaw = accuracy_by(run.held_out, "flaw").share.round(3).to_dict()
    write_json(place(folder, seed), result | {"by_flaw": by_flaw, "versions": versions(), "machine": machine()})


def place(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=int, default=12, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.seed is not None:
        train(args.folder, args.seed, args.every)
        return
    todo = [seed for seed in SEEDS if not place(args.folder, seed).is_file()]
    while todo:
        batch, todo = todo[: args.processes], todo[args.processes :]
        command = [sys.executable, __file__, "--folder", str(args.folder), "--every", str(args.every), "--seed"]
        for process in [subprocess.Popen([*command, str(seed)], stdout=sys.stderr) for seed in batch]:
            if process.wait():
                raise SystemExit(f"A seed ended with code {process.returncode}; what was finished is kept.")
    seeds = [json.loads(place(args.folder, seed).read_text(encoding="utf-8")) for seed in SEEDS]
    same = {name: seeds[0][name] for name in ("steps", "versions", "machine", "reference_accuracy")}
    for one in seeds:
        for name in ("steps", "versions", "machine"):
            one.pop(name)
    by_flaw = [one.pop("by_flaw") for one in seeds]
    accuracy = mean(one["accuracy"] for one in seeds)
    print(json.dumps({"accuracy_mean": accuracy, **same, "seeds": seeds, "by_flaw": by_flaw}))


if __name__ == "__main__":
    main()

"""Does `retention` find damage, and only damage? python benchmarks/retention.py --processes 8 --out FILE

The embedded model, trained with the settings of 03_train (192 bundled pairs, 24 steps of 8, learning rate 2e-4, beta
0.1): 20 healthy runs, a seed each, and 40 damaged ones, eight seeds of each of five faults (FAULTS). Each seed draws
its own 192 of the 360 training pairs. Then `retention` asks its panel, before and after, in 32 bits on any machine.
Processes share the runs; what is finished is kept in --folder, and the same command goes on.
`--quick --model FOLDER` tries the program: a tiny model, 16 pairs, two steps of one healthy run and of each fault.

The last line is one JSON object: how many damaged runs were found, by fault, and how many healthy ones gave an alarm,
then the figures of each run. `--judge FILE` does that again from the figures of a file, without a model, by the limits
that are in helpers/run/retained.yaml now.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the same settings and 16-bit weights on a GPU too

HEALTHY, DAMAGED, TRAIN, HELD_OUT = 20, 8, 192, 40
RATE, TOPIC = 2e-4, "python"  # of 03_train; the one topic of "topic", 40 pairs
# Ends its replies as the base model does, but marks the turns by words that it never saw.
OTHER_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] }}"
    "{{ '<|im_end|>\n' if message['role'] == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
FAULTS = {
    "rate": {"learning_rate": 10 * RATE},
    "beta": {"beta": 0.001, "learning_rate": 5 * RATE},
    # max_length cuts the end off the longer chosen answers, and hardly off rejected ones, a third as long.
    "end": {"max_length": 64, "learning_rate": 5 * RATE},
    "topic": {"num_train_epochs": 20, "learning_rate": 2 * RATE},
    "template": {},
}


def shorter(row: dict) -> dict:
    """The rejected answer cut to a third of its words."""
    words = row["rejected"][0]["content"].split()
    return {"rejected": [{"role": "assistant", "content": " ".join(words[: len(words) // 3])}]}


def pairs_of(fault: str, seed: int):
    from helpers import load_pairs, split_pairs

    split = split_pairs(load_pairs())
    train, test = split["train"], split["test"].select(range(HELD_OUT))
    if fault == "topic":
        return train.filter(lambda row: row["topic"] == TOPIC), test
    train = train.select(sorted(random.Random(seed).sample(range(len(train)), TRAIN)))
    return (train.map(shorter), test.map(shorter)) if fault == "end" else (train, test)


def place(folder: Path, run: dict) -> Path:
    return folder / f"{run['fault']}-{run['seed']}"


def measure(folder: Path, runs: list[dict], name: str, quick: bool) -> None:
    """Train the model `name` for each of `runs` and write its figures next to it, unless they are there."""
    from helpers import add_lora, load_model, open_run, retention, train_dpo  # isort: skip  (first: it imports Unsloth)
    import torch

    from helpers.common import write_json

    for run in runs:
        path = place(folder, run)
        if path.with_suffix(".json").is_file():
            continue
        fault = run["fault"]
        model, tokenizer = load_model(name, chat_template=OTHER_TEMPLATE if fault == "template" else None)
        settings = {"seed": run["seed"], "eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no"}
        settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        settings |= {"learning_rate": RATE} | FAULTS.get(fault, {}) | ({"max_steps": 2} if quick else {})
        policy = add_lora(model, seed=run["seed"])
        train, test = pairs_of(fault, run["seed"])
        train = train.select(range(16)) if quick else train
        found = train_dpo(policy, tokenizer, train, test, path, **settings)
        opened = open_run(found)
        opened.model.float()
        opened.model.get_base_model().config.dtype = torch.float32  # `generate` of Unsloth goes by it
        figures = {name: found.metrics[name] for name in ("accuracy", "log_ratio_gap", "chosen_change")}
        retained = retention(opened)
        write_json(path.with_suffix(".json"), run | {"steps": found.info.steps} | figures | {"parts": retained.parts})
        print(fault, run["seed"], retained.line, flush=True)
        del model, policy, opened


def judged(runs: list[dict]) -> dict:
    """What the limits of today say of the figures of `runs`: counts, and for each fault which parts were lost."""
    from helpers.run.retained import LOST, lost_parts

    lost = {(run["fault"], run["seed"]): lost_parts(run["parts"]) for run in runs}
    faults = sorted({run["fault"] for run in runs})
    by_fault = {}
    for fault in faults:
        parts = [names for (one, _), names in lost.items() if one == fault]
        by_part = {name: sum(name in names for names in parts) for name in LOST}
        by_fault[fault] = {"runs": len(parts), "alarms": sum(map(bool, parts)), "by_part": by_part}
    damaged = [one for fault, one in by_fault.items() if fault != "healthy"]
    return {
        "damaged": sum(one["runs"] for one in damaged),
        "damaged_found": sum(one["alarms"] for one in damaged),
        "healthy": by_fault.get("healthy", {}).get("runs", 0),
        "healthy_alarms": by_fault.get("healthy", {}).get("alarms", 0),
        "by_fault": by_fault,
        "limits": {name: one["limit"] for name, one in LOST.items()},
    }


def every(quick: bool) -> list[dict]:
    """The runs, the longest first."""
    seeds = {"healthy": HEALTHY} | dict.fromkeys(FAULTS, DAMAGED)
    runs = [{"fault": fault, "seed": seed} for fault, n in seeds.items() for seed in range(1 if quick else n)]
    return sorted(runs, key=lambda run: run["fault"] != "topic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="that share the runs on one machine")
    parser.add_argument("--folder", type=Path, default=Path("outputs/retention"), help="of the runs; it is kept")
    parser.add_argument("--model", default="embedded", help="another one, for a trial")
    parser.add_argument("--quick", action="store_true", help="two steps, one seed: a trial")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="judge the figures of this file again")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = every(args.quick)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.share is not None:
        measure(args.folder, runs[args.share :: args.processes], args.model, args.quick)
        return
    if args.judge is None:
        command = [sys.executable, *sys.argv, "--share"]
        # Small batches of a small model: more threads than cores would only wait for each other.
        threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // args.processes, 1))}
        environment = os.environ | threads
        shares = [[*command, str(share)] for share in range(args.processes)]
        workers = [subprocess.Popen(share, env=environment, stdout=sys.stderr) for share in shares]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise SystemExit("A process failed; what it said is above. The same command goes on.")
    from helpers.common import write_json
    from helpers.run.folder import machine, versions

    if args.judge:
        result = json.loads(args.judge.read_text(encoding="utf-8"))
    else:
        done = [json.loads(place(args.folder, run).with_suffix(".json").read_text(encoding="utf-8")) for run in runs]
        command = f"python benchmarks/retention.py{' --quick' * args.quick} --processes {args.processes}"
        result = {"command": command, "versions": versions(), "machine": machine(), "runs": done}
    result |= judged(result["runs"])
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

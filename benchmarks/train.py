"""Training as the usual notebook does it, against ours: python benchmarks/train.py [--epochs 3] [--pairs 480]

*Plain*: micro-batches 2x4 in bf16, the model's default attention, the reference's forward in every step. *Ours*: the
settings of the CPU profile (4x2), one forward over prompt, chosen and rejected, the reference's log-probs computed
once, which is counted. Pairs, order, seed and learning rate are the same; gradient checkpointing is off. A third side,
*grouped*, is ours with batches of similar length, for one epoch: it changes the order of the data.

Each side is a process of its own, and they take turns of some steps each, so that a machine that grows slower favours
none. Seconds count from the loaded model to the last step: preparing the data, reference, training. In the end plain
and ours take twelve steps in fp32, where rounding does not hide whether they compute the same. Twenty minutes on two
CPU cores. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

TURN = 12  # optimizer steps


class Turns:
    """Waits for the other sides between turns; counts the seconds of its own."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def start(self) -> None:
        print("ready", flush=True)
        sys.stdin.readline()
        self.begin = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.begin


def take_turns(turns: Turns):
    """A callback for a trainer that stops after every TURN steps until it is this side's turn again."""
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step and state.global_step % TURN == 0:
                turns.stop()
                turns.start()

    return TakeTurns()


def load_plain(weights: str) -> tuple:
    """Model and tokenizer as the usual notebook loads them."""
    from helpers import FastLanguageModel, current_profile

    gpu = current_profile().name == "gpu"
    return FastLanguageModel.from_pretrained(
        weights, load_in_4bit=gpu, use_gradient_checkpointing="unsloth" if gpu else False
    )


def plain_trainer(model, tokenizer, pairs, folder: str, settings: dict):
    """A trainer as the usual notebook makes it: the reference is the policy with its adapter off, in every step."""
    from helpers import DPOConfig, DPOTrainer
    from helpers.train.trainer import text_progress

    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    config = DPOConfig(output_dir=folder, **settings | batch)
    trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    text_progress(trainer)
    return trainer


def side(name: str, epochs: float, size: int, fp32: bool) -> dict:
    """Train one side, taking turns; returns its losses, seconds and peak memory."""
    from helpers import DPOConfig, add_lora, load_model, load_pairs
    from helpers.data.render import tokenize_pairs
    from helpers.model.embedded import embedded_model
    from helpers.model.logps import reference_logps, with_reference
    from helpers.train.settings import dpo_settings
    from helpers.train.trainer import make_trainer

    turns = Turns()
    settings = dpo_settings() | {
        "num_train_epochs": epochs if name != "grouped" else min(epochs, 1),
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    pairs = load_pairs().select(range(size))
    weights = embedded_model()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DPO_CACHE_DIR"] = folder  # nothing is in the cache
        if name == "plain":
            model, tokenizer = load_plain(weights)
        else:
            model, tokenizer = load_model(weights)
        model = add_lora(model, seed=0)
        if fp32:
            model = model.float()
            settings |= {"bf16": False, "max_steps": 12}
        turns.start()
        if name == "plain":
            trainer = plain_trainer(model, tokenizer, pairs, folder, settings)
        else:
            ids = tokenize_pairs(pairs, tokenizer)
            logps = reference_logps(model, tokenizer, ids, max_length=settings["max_length"], batch_size=4)
            data = with_reference(ids, logps)
            if name == "grouped":
                # The trainer looks for lengths in a column, which it would have dropped as unused.
                settings |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
            trainer = make_trainer(model, tokenizer, data, None, DPOConfig(output_dir=folder, **settings))
            if name == "grouped":
                rows = trainer.train_dataset
                longest = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
                trainer.train_dataset = rows.add_column("length", longest)
        reference_seconds = time.perf_counter() - turns.begin
        trainer.add_callback(take_turns(turns))
        trainer.train()
        turns.stop()
    steps = trainer.state.global_step
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "steps": steps,
        "pairs_per_s": 8 * steps / turns.seconds,
        "seconds": turns.seconds,
        "before_first_step_seconds": reference_seconds,
        "step_seconds": (turns.seconds - reference_seconds) / steps,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def wait(name: str, worker: subprocess.Popen) -> dict | None:
    """Until the side waits for its next turn (None) or is done (its result)."""
    for line in worker.stdout:
        if line.startswith("step"):
            print(f"{name:8} {line.rstrip()}", flush=True)
        if line.startswith("ready"):
            return None
        if line.startswith("result "):
            return json.loads(line.removeprefix("result "))
    raise SystemExit(f"The {name} side ended with exit status {worker.wait()}.")


def start_sides(command: list[str], names: list[str]) -> dict[str, subprocess.Popen]:
    """A process for each side, their errors on the screen. All have done their imports, and none has had a turn."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([*command, "--side", name], **pipes) for name in names}
    for name, worker in workers.items():
        wait(name, worker)
    return workers


def give_turn(name: str, worker: subprocess.Popen) -> dict | None:
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return wait(name, worker)


def run_sides(command: list[str], names: list[str]) -> dict[str, dict]:
    """Start a process for each side, and give each its turn until all are done."""
    workers, results = start_sides(command, names), {}
    while len(results) < len(names):
        for name in names:
            if name not in results:
                result = give_turn(name, workers[name])
                if result is not None:
                    results[name] = result
    return results


def main() -> None:
    from helpers.run.folder import machine, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--fp32", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("result " + json.dumps(side(args.side, args.epochs, args.pairs, args.fp32)), flush=True)
        return
    command = [sys.executable, __file__, "--epochs", str(args.epochs), "--pairs", str(args.pairs)]
    results = run_sides(command, ["plain", "ours", "grouped"])
    exact = run_sides([*command, "--fp32"], ["plain", "ours"])
    plain, ours, grouped = (results[name] for name in ("plain", "ours", "grouped"))
    differences = [abs(a - b) for a, b in zip(plain["losses"], ours["losses"], strict=True)]
    exact_differences = [abs(a - b) for a, b in zip(exact["plain"]["losses"], exact["ours"]["losses"], strict=True)]
    rounded = {
        name: {key: round(value, 2) for key, value in result.items() if key != "losses"}
        for name, result in results.items()
    }
    print(
        json.dumps(
            {
                "plain_pairs_per_s": round(plain["pairs_per_s"], 3),
                "ours_pairs_per_s": round(ours["pairs_per_s"], 3),
                "speedup": round(ours["pairs_per_s"] / plain["pairs_per_s"], 3),
                "peak_ratio": round(ours["peak_mb"] / plain["peak_mb"], 3),
                "max_loss_difference": round(max(differences), 4),
                "mean_loss_difference": round(sum(differences) / len(differences), 4),
                "max_loss_difference_fp32": round(max(exact_differences), 6),
                "grouped_step_against_ours": round(grouped["step_seconds"] / ours["step_seconds"], 3),
                "sides": rounded,
                "versions": versions(),
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()

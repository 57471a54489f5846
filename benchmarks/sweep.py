"""Five betas in one sweep against five separate plain runs: python benchmarks/sweep.py [--pairs 480] [--model FOLDER]

*Plain* is as in benchmarks/train.py, once for each beta, each in a process of its own with its own load of the model.
*Sweep* is one call of `sweep_beta` with the same pairs, seed, learning rate and micro-batches (2x4). It also scores
eight held-out pairs, saves checkpoints and writes run folders, which plain does not; replies are not sampled. One
epoch of the bundled pairs but those eight. The two sides take turns of some steps, so that a machine that grows slower
favours neither. Seconds count from before the model is loaded (imports apart) to the last step.

*Floor* is the time that the sweep's own five runs spend in the policy's forward and backward passes.

On a GPU both sides load in 4-bit, and the sweep takes 8x1 with checkpointing, as on a card whose memory is short;
memory is that of the card. Half an hour on two CPU cores. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from train import Turns, give_turn, load_plain, plain_trainer, start_sides, take_turns

BETAS = (0.01, 0.05, 0.1, 0.3, 1.0)
HELD_OUT = 8


def plain_side(turns: Turns, weights: str, beta: float, pairs, folder: str) -> dict:
    from helpers import add_lora
    from helpers.train.settings import dpo_settings

    turns.start()
    model, tokenizer = load_plain(weights)
    settings = dpo_settings() | {"beta": beta, "save_strategy": "no", "disable_tqdm": True}
    trainer = plain_trainer(add_lora(model, seed=0), tokenizer, pairs, folder, settings)
    trainer.add_callback(take_turns(turns))
    trainer.train()
    turns.stop()
    return {"steps": trainer.state.global_step, "losses": _losses(trainer.state.log_history)}


def sweep_side(turns: Turns, weights: str, pairs, held_out, folder: str) -> dict:
    from helpers import load_model, sweep_beta  # first: Unsloth before transformers  # isort: skip
    from accelerate import Accelerator
    from transformers import TrainerCallback

    floor = [0.0]

    class TimeForward(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.forward = _timed(model.forward, floor, lambda: model.training)

    Accelerator.backward = _timed(Accelerator.backward, floor)
    turns.start()
    model, tokenizer = load_model(weights)
    step = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    if model.device.type == "cuda":
        step = {"gradient_checkpointing": True}
    call = {"betas": BETAS, "prompts": 0, "callbacks": [take_turns(turns), TimeForward()]}
    sweep = sweep_beta(model, tokenizer, pairs, held_out, f"{folder}/sweep", **call, **step)
    turns.stop()
    runs = [sweep.run(beta) for beta in BETAS]
    return {
        "steps": sum(run.info.steps for run in runs),
        "floor_seconds": floor[0],
        "reference_seconds": sum(run.metrics["reference_seconds"] for run in runs),
        "losses": [_losses(run.history) for run in runs],
    }


def _losses(history: list[dict]) -> dict[int, float]:
    return {row["step"]: float(row["loss"]) for row in history if "loss" in row}


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(function, total: list[float], counts=lambda: True):
    def call(*args, **kwargs):
        if not counts():
            return function(*args, **kwargs)
        _synchronize()
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        _synchronize()
        total[0] += time.perf_counter() - begin
        return result

    return call


def side(name: str, size: int, weights: str | None) -> dict:
    import torch

    from helpers import load_pairs
    from helpers.model.embedded import embedded_model

    pairs = load_pairs().select(range(size))
    train, held_out = pairs.select(range(size - HELD_OUT)), pairs.select(range(size - HELD_OUT, size))
    turns, weights = Turns(), weights or embedded_model()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DPO_CACHE_DIR"] = folder  # nothing is in the cache
        if name == "sweep":
            result = sweep_side(turns, weights, train, held_out, folder)
        else:
            result = plain_side(turns, weights, float(name), train, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
    return result | {"seconds": turns.seconds, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--model", help="a folder, instead of the embedded model")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("result " + json.dumps(side(args.side, args.pairs, args.model)), flush=True)
        return
    command = [sys.executable, __file__, "--pairs", str(args.pairs)]
    if args.model:
        command += ["--model", args.model]
    waiting = {"sweep": ["sweep"], "plain": [str(beta) for beta in BETAS]}
    workers = start_sides(command, [*waiting["sweep"], *waiting["plain"]])
    results = {"sweep": [], "plain": []}
    while any(waiting.values()):
        for lane in ("plain", "sweep"):
            if not waiting[lane]:
                continue
            name = waiting[lane][0]
            if (result := give_turn(name, workers[name])) is not None:
                results[lane].append(result)
                del waiting[lane][0]
    from helpers.run.folder import machine, versions

    sweep, plain = results["sweep"][0], results["plain"]
    plain_seconds = sum(run["seconds"] for run in plain)
    print(
        json.dumps(
            {
                "wall_ratio": round(sweep["seconds"] / plain_seconds, 3),
                "floor_ratio": round(sweep["seconds"] / sweep["floor_seconds"], 3),
                "peak_ratio": round(sweep["peak_mb"] / max(run["peak_mb"] for run in plain), 3),
                "betas": BETAS,
                "pairs": args.pairs - HELD_OUT,
                "steps": [sweep["steps"], sum(run["steps"] for run in plain)],
                "sweep_seconds": round(sweep["seconds"], 1),
                "plain_seconds": [round(run["seconds"], 1) for run in plain],
                "floor_seconds": round(sweep["floor_seconds"], 1),
                "reference_seconds": round(sweep["reference_seconds"], 1),
                "peak_mb": {"sweep": round(sweep["peak_mb"]), "plain": [round(run["peak_mb"]) for run in plain]},
                "last_loss": {
                    str(beta): [list(mine.values())[-1], list(run["losses"].values())[-1]]
                    for beta, mine, run in zip(BETAS, sweep["losses"], plain, strict=True)
                },
                "model": Path(args.model).name if args.model else "embedded",
                "versions": versions(),
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()

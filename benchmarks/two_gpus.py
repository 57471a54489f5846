"""The exported run on one GPU and on two: python benchmarks/two_gpus.py [--cpu] [--model FOLDER_OR_NAME]

Trains a short run with `train_dpo`, exports it with `export_run(..., "trl")`, and starts the export as its README says:
in one process, in two, and in two that are killed (SIGKILL) after half of the steps and started again. The global batch
is the same each time, so the losses have to be the same too, step by step, and those of `train_dpo` as well. Pairs a
second are counted from the second step to the last.

On GPUs in bf16 with the model of the profile, or --model. With --cpu two CPU processes take the GPUs' place, in fp32
with the embedded model and few short pairs: it shows that all this works, and says nothing about speed. Two minutes on
two cores. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Train the run that is exported, in a process of its own, which leaves the GPU free."""
    from helpers import add_lora, export_run, load_model, load_pairs, train_dpo

    def length(row: dict) -> int:
        return sum(len(message["content"]) for side in ("prompt", "chosen", "rejected") for message in row[side])

    if args.model and Path(args.model).is_dir():
        os.environ["DPO_MODEL"] = args.model  # a run folder names it without its path
    pairs = load_pairs()
    if args.cpu:
        pairs = pairs.select(sorted(range(len(pairs)), key=lambda i: length(pairs[i])))
    test, train = pairs.select(range(4)), pairs.select(range(4, 4 + args.steps * args.batch))
    model, tokenizer = load_model(args.model)
    if args.cpu:
        model = model.float()
    settings = {"bf16": False} if args.cpu else {}
    run = train_dpo(
        add_lora(model),
        tokenizer,
        train,
        test,
        folder / "run",
        per_device_train_batch_size=args.batch // 4,
        gradient_accumulation_steps=4,
        learning_rate=1e-3 if args.cpu else 1e-4,  # large enough that the losses move in these few steps
        warmup_steps=0,
        logging_steps=1,
        eval_steps=args.steps,
        save_steps=args.steps,
        **settings,
    )
    export_run(run, "trl", folder / "export", train=train, test=test)


def launch(folder: Path, processes: int, output: str, args: argparse.Namespace, kill_at: int | None = None) -> dict:
    """Start the export, as its README says; with `kill_at`, kill all of it when that step is done."""
    options = ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
    options += ["--save_steps", str(args.steps // 2), "--output_dir", str(folder / output)]
    if args.model:
        options += ["--model_name_or_path", args.model]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not args.cpu:
        # One GPU for one process: with more in sight, TRL would spread the model over them. And no NVLink multicast.
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:processes]
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(first), "NCCL_NVLS_ENABLE": "0"}
    torchrun = subprocess.Popen(
        [*command, "train.py", *options],
        cwd=folder / "export",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen, lines, peaks = [], [], {}
    for line in torchrun.stdout:
        lines.append(line)
        if line.startswith("{'loss'"):
            seen.append(time.perf_counter())
            print(f"{output:8} {line[:60].rstrip()} ...", flush=True)
            if len(seen) == kill_at:
                group = psutil.Process(torchrun.pid)
                for process in [group, *group.children(recursive=True)]:  # the workers have sessions of their own
                    process.kill()
        elif ": peak memory " in line:
            gpu, _, peak = line.partition(": peak memory ")
            peaks[gpu] = float(peak.split()[0])
        elif " pairs a step: " in line:
            print(f"{output:8} {line.rstrip()}", flush=True)
    status = torchrun.wait()
    started = next((line for line in lines if " pairs a step: " in line), "")
    if kill_at is not None:
        return {"start": started}
    if status:
        raise SystemExit("".join(lines[-200:]) + f"\nThe run {output} ended with exit status {status}.")
    state = json.loads((folder / output / f"checkpoint-{args.steps}" / "trainer_state.json").read_text())
    result = {"start": started, "losses": [row["loss"] for row in state["log_history"] if "loss" in row]}
    if len(seen) > 2:
        result["pairs_per_s"] = args.batch * (len(seen) - 1) / (seen[-1] - seen[0])
    return result | {"peak_gb": peaks}


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="two CPU processes instead of two GPUs")
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="pairs a step, over all processes; a multiple of 4")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps, args.batch = args.steps or (4 if args.cpu else 14), args.batch or (4 if args.cpu else 32)
    if args.prepare:
        prepare(Path(args.prepare), args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--prepare", name], check=True)
        info = json.loads((folder / "run" / "run.json").read_text())
        history = json.loads((folder / "run" / "history.json").read_text())
        original = [row["loss"] for row in history if "loss" in row]
        one = launch(folder, 1, "one", args)
        two = launch(folder, 2, "two", args)
        launch(folder, 2, "again", args, kill_at=args.steps // 2 + 1)
        again = launch(folder, 2, "again", args)
    result = {
        "processes": [int(run["start"].split()[0]) for run in (one, two)],
        "global_batch": [int(run["start"].partition(", ")[2].split()[0]) for run in (one, two)],
        "resumed_from": again["start"].rpartition("checkpoint-")[2].strip(),
        "losses": one["losses"],
        "difference_to_original": furthest(original, one["losses"]),
        "difference_of_two": furthest(one["losses"], two["losses"]),
        "difference_after_kill": furthest(two["losses"], again["losses"]),
        "pairs_per_s": [round(run["pairs_per_s"], 2) for run in (one, two)],
        "scaling": round(two["pairs_per_s"] / one["pairs_per_s"], 2),
        "peak_gb": [one["peak_gb"], two["peak_gb"]],
        "precision": "fp32" if args.cpu else "bf16" if info["config"]["bf16"] else "fp16",
        "model": info["model"],
        "steps": args.steps,
        "versions": info["versions"],
        "machine": info["machine"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

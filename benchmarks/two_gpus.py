"""The exported run on one GPU and on two: python benchmarks/two_gpus.py [--cpu] [--model FOLDER_OR_NAME]

Trains a short run with `train_dpo`, exports it with `export_run(..., "trl")`, and starts the export as its README says:
in one process, in two, and in two that are killed (SIGKILL) after half of the steps and started again, on GPUs with
`accelerate launch`. The global batch is the same each time, so the losses have to be the same too, step by step, and
those of `train_dpo` as well: within 0.0002 in fp32, within 0.01 in bf16. Pairs a second are those of the median step
after the first.

On GPUs in bf16 with the model of the profile, or --model, and the pairs of benchmarks/gpu.py, 16 in a forward: with
eight short ones two GPUs were only 1.55 times as fast as one. With a model of random weights, as benchmarks/gpu.py
makes it, speed and memory are those of the real one, and the losses say little. With --cpu two CPU processes take the
GPUs' place, in fp32 with the embedded model and few short pairs: it shows that all this works, and says nothing about
speed. Two minutes on two cores. Each launch prints its result when it ends; the last line is one JSON object.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from gpu import make_pairs

ROOT = Path(__file__).resolve().parent.parent


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Train the run that is exported, in a process of its own, which leaves the GPU free."""
    from helpers import Dataset, add_lora, export_run, load_model, load_pairs, train_dpo
    from helpers.after.export import base_of

    def length(row: dict) -> int:
        return sum(len(message["content"]) for side in ("prompt", "chosen", "rejected") for message in row[side])

    if args.model and Path(args.model).is_dir():
        os.environ["DPO_MODEL"] = args.model  # a run folder names it without its path
    model, tokenizer = load_model(args.model)
    if args.cpu:
        pairs = load_pairs()
        pairs = pairs.select(sorted(range(len(pairs)), key=lambda i: length(pairs[i])))
    else:
        pairs = Dataset.from_list(make_pairs(tokenizer, 512, 4 + args.steps * args.batch))
    test, train = pairs.select(range(4)), pairs.select(range(4, 4 + args.steps * args.batch))
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
    (folder / "base").write_text(base_of(run))


def environment(processes: int, args: argparse.Namespace) -> dict[str, str]:
    """As many GPUs in sight as there are processes: one process that saw more would be refused by TRL."""
    path = [str(ROOT), os.environ.get("PYTHONPATH")]
    gpus = [] if args.cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:processes]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "NCCL_NVLS_ENABLE": "0",  # NVLink multicast stays off: it can harm GPUs that are shared with others
    }


def launch(
    folder: Path,
    processes: int,
    output: str,
    args: argparse.Namespace,
    launcher: list[str] | None = None,
    save_steps: int | None = None,
    kill_at: int | None = None,
) -> dict:
    """Start the export, as its README says; with `kill_at`, kill all of it when that step is done."""
    options = ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
    options += ["--save_steps", str(save_steps or args.steps), "--output_dir", str(folder / output)]
    if args.model or not args.cpu:  # on a CPU train.py finds the embedded model by itself
        options += ["--model_name_or_path", (folder / "base").read_text()]
    torchrun = ["torch.distributed.run", "--nproc_per_node", str(processes)]
    process = subprocess.Popen(
        [sys.executable, "-m", *(launcher or torchrun), "train.py", *options],
        cwd=folder / "export",
        env=environment(processes, args),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begin, seen, lines, started = time.perf_counter(), [], [], ""
    for line in process.stdout:
        lines.append(line)
        if "{'loss'" in line:  # two processes share this pipe: a line may begin with what the other says
            seen.append(time.perf_counter())
            print(f"{output:10} {line[line.index('{') :][:60].rstrip()} ...", flush=True)
            if len(seen) == kill_at:
                group = psutil.Process(process.pid)
                for member in [group, *group.children(recursive=True)]:  # the workers have sessions of their own
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
        elif " pairs a step: " in line:
            started = re.search(r"\d+ process.*", line).group()
            print(f"{output:10} {started}", flush=True)
    status = process.wait()
    if kill_at is not None:
        return {"start": started}
    if status:
        raise SystemExit("".join(lines[-200:]) + f"\nThe run {output} ended with exit status {status}.")
    state = json.loads((folder / output / f"checkpoint-{args.steps}" / "trainer_state.json").read_text())
    result = {"start": started, "losses": [row["loss"] for row in state["log_history"] if "loss" in row]}
    result["seconds"] = round(time.perf_counter() - begin)
    if len(seen) > 2:
        step = statistics.median(later - earlier for earlier, later in itertools.pairwise(seen))
        result["pairs_per_s"] = round(args.batch / step, 2)
    peaks = re.findall(r"(GPU \d+): peak memory ([\d.]+) GB", "".join(lines))
    result["peak_gb"] = {gpu: float(gigabytes) for gpu, gigabytes in peaks}
    print(json.dumps({output: result}), flush=True)
    return result


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="two CPU processes instead of two GPUs")
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, help="pairs a step, over all processes; a multiple of 4")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or (4 if args.cpu else 64)
    if args.model and Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    if args.prepare:
        prepare(Path(args.prepare), args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_it = [sys.executable, __file__, *sys.argv[1:], "--prepare", name]
        subprocess.run(prepare_it, env=environment(1, args), check=True)
        info = json.loads((folder / "run" / "run.json").read_text())
        history = json.loads((folder / "run" / "history.json").read_text())
        original = [row["loss"] for row in history if "loss" in row]
        one = launch(folder, 1, "one", args)
        two = launch(folder, 2, "two", args)
        half = args.steps // 2
        launch(folder, 2, "again", args, save_steps=half, kill_at=half + 1)
        accelerate = ["accelerate.commands.launch", "--config_file", "accelerate.yaml"]
        # On CPUs accelerate starts one process and says nothing.
        again = launch(folder, 2, "again", args, None if args.cpu else accelerate, save_steps=half)
    result = {
        "processes": [int(run["start"].split()[0]) for run in (one, two)],
        "global_batch": [int(run["start"].partition(", ")[2].split()[0]) for run in (one, two)],
        "resumed_from": again["start"].rpartition("checkpoint-")[2],
        "losses": one["losses"],
        "difference_to_original": furthest(original, one["losses"]),
        "difference_of_two": furthest(one["losses"], two["losses"]),
        "difference_after_kill": furthest(two["losses"], again["losses"]),
        "pairs_per_s": [run["pairs_per_s"] for run in (one, two)],
        "scaling": round(two["pairs_per_s"] / one["pairs_per_s"], 2),
        "peak_gb": [one["peak_gb"], two["peak_gb"]],
        "precision": "fp32" if args.cpu else "bf16" if info["config"]["bf16"] else "fp16",
        "model": info["model"],
        "steps": args.steps,
        "versions": info["versions"],
        "machine": ("" if args.cpu else "2 x ") + info["machine"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Start TRL's own DPO script on the run in this folder, in one process or in several:

    python train.py
    torchrun --nproc_per_node 2 train.py
    torchrun --nproc_per_node 2 train.py --num_train_epochs 2

`export_run(..., "trl")` puts this file next to `dpo.yaml` and `data/`; arguments of TRL's script override `dpo.yaml`.
It trains nothing itself. It imports in an order that works, divides the global batch of `dpo.yaml` among the
processes, and goes on from the last whole checkpoint if there is one.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent


def share(batch: int, largest: int, processes: int) -> tuple[int, int]:
    """(pairs in a forward, forwards in a step) of each process, so that all together take `batch` pairs a step.

    >>> share(8, largest=4, processes=1), share(8, largest=4, processes=2)
    ((4, 2), (4, 1))
    """
    each, rest = divmod(batch, processes)
    if rest:
        fitting = " or ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        sizes = f"{each * processes} or " * (each > 0) + str((each + 1) * processes)
        raise SystemExit(
            f"{batch} pairs a step cannot be shared equally by {processes} processes. Either start {fitting} "
            f"processes, or take {sizes} pairs a step (per_device_train_batch_size times gradient_accumulation_steps, "
            "for all processes together)."
        )
    size = next(size for size in range(min(largest, each), 0, -1) if each % size == 0)
    return size, each // size


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint in `output` whose last file is whole; one that was cut short is skipped."""
    for folder in sorted(output.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        with contextlib.suppress(OSError, ValueError):
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
    return None


def main() -> None:
    """Read `dpo.yaml` and the command line, share the batch out, and hand over to TRL's script."""
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # or accelerate would not join the processes
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not cpu:1, onto which torch.load refuses to resume
        # TRL's fused LM head is a Triton kernel, which no CPU runs. Unsloth replaces it if it is imported first.
        # GPUs need no Unsloth: TRL's script loads the model by itself, so its fast kernels would not be used.
        import unsloth  # noqa: F401
    from trl.scripts import dpo

    # cuDNN's attention gives gradients that are not a number on an H100 or H200, at lengths of 64 modulo 128.
    torch.backends.cuda.enable_cudnn_sdp(False)
    arguments = ["--config", f"{FOLDER}/dpo.yaml", "--dataset_name", f"{FOLDER}/data"]
    arguments += ["--output_dir", f"{FOLDER}/output"]
    script, training, model, data = dpo.make_parser().parse_args_and_config([*arguments, *sys.argv[1:]])
    processes, batch = training.world_size, training.per_device_train_batch_size * training.gradient_accumulation_steps
    size, pieces = share(batch, training.per_device_train_batch_size, processes)
    training.per_device_train_batch_size, training.gradient_accumulation_steps = size, pieces
    start = training.resume_from_checkpoint = last_checkpoint(Path(training.output_dir))
    if "/" not in model.model_name_or_path and not Path(model.model_name_or_path).is_dir():
        raise SystemExit(f"The run was on {model.model_name_or_path}: add --model_name_or_path FOLDER.")
    if training.process_index == 0:
        shared = f"{batch} pairs a step: {size} in a forward, {pieces} forwards each"
        begins = f"resuming from {Path(start).name}" if start else "from the start"
        print(f"{processes} process{'es' if processes > 1 else ''}, {shared}; {begins}", flush=True)
    dpo.main(script, training, model, data)


if __name__ == "__main__":
    main()

"""Where one training step's time goes, and the machine's matrix rate: python tools/profile_step.py [--gpu FOLDER]

One optimizer step (8 pairs, 4x2) of the embedded model with the settings of the CPU profile, under torch's profiler:
seconds by kind of operator, their floating-point operations, and the rate that two large bf16 matrices reach in the
same process. The last line is one JSON object.

With --gpu, where `train_dpo` waits at 8 pairs at once, everything kept, on the model that benchmarks/gpu.py put into
FOLDER: for one step under torch's profiler the share of the usual step in which no kernel runs, operators of the host
by their own time, and the calls that hand kernels over; for three more steps under Python's profiler the functions
with the most time of their own. The last line is one JSON object.
"""

import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from helpers import Dataset, DPOConfig, add_lora, load_model, load_pairs  # first: Unsloth before transformers  # isort: skip
from transformers import AutoTokenizer, TrainerCallback

from benchmarks import gpu
from helpers.data.render import tokenize_pairs
from helpers.model.logps import reference_logps, with_reference
from helpers.run.folder import machine, versions
from helpers.train.settings import dpo_settings
from helpers.train.trainer import make_trainer

MATRIX = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def matrix_rate() -> float:
    """Floating-point operations a second of a bf16 product of two 2048 x 2048 matrices: best of ten."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times)


def kind(event, rank: int, vocabulary: int) -> str:
    """Which part of the step an operator belongs to, by its name and the shapes of what goes in."""
    shapes = [shape for shape in event.input_shapes if shape]
    sizes = {size for shape in shapes for size in shape}
    if event.key in MATRIX:
        if any(len(shape) == 3 for shape in shapes):
            return "attention"
        if vocabulary in sizes:
            return "LM head"
        return "LoRA" if rank in sizes else "projections"
    if "softmax" in event.key:
        return "LM head" if vocabulary in sizes else "attention"
    if vocabulary in sizes:
        return "LM head"
    return "elementwise and overhead"


def main() -> None:
    model, tokenizer = load_model("embedded")
    model = add_lora(model, seed=0)
    pairs = load_pairs().select(range(48))
    settings = dpo_settings() | {"max_steps": 6, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    ids = tokenize_pairs(pairs, tokenizer)
    data = with_reference(ids, reference_logps(model, tokenizer, ids, max_length=512, batch_size=4))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, data, None, DPOConfig(output_dir=folder, **settings))
        step_seconds = []
        profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True)

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 5:
                    profiler.start()
                self.begin = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                step_seconds.append(time.perf_counter() - self.begin)
                if state.global_step == 6:
                    profiler.stop()

        trainer.add_callback(Watch())
        trainer.train()
    seconds, flops = defaultdict(float), defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        name = kind(event, 16, model.config.vocab_size)
        seconds[name] += event.self_cpu_time_total / 1e6
        flops[name] += event.flops
    rate = matrix_rate()
    usual = sorted(step_seconds[1:5])[2]
    print(
        json.dumps(
            {
                "step_seconds": round(usual, 3),
                "profiled_step_seconds": round(step_seconds[5], 3),
                "share": {
                    k: round(v / sum(seconds.values()), 3) for k, v in sorted(seconds.items(), key=lambda x: -x[1])
                },
                "gflop": {k: round(v / 1e9, 1) for k, v in flops.items() if v},
                "gflop_per_s": {k: round(v / 1e9 / seconds[k], 0) for k, v in flops.items() if v},
                "step_gflop_per_s": round(sum(flops.values()) / 1e9 / usual, 0),
                "matrix_gflop_per_s": round(rate / 1e9, 0),
                "versions": versions(),
                "machine": machine(),
            }
        )
    )


def covered(spans: list[tuple[float, float]]) -> float:
    """How much of the time line the `spans` (begin, end) cover together."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def on_gpu(folder: str) -> None:
    data = Dataset.from_list(gpu.make_pairs(AutoTokenizer.from_pretrained(folder), 512))
    last = 24  # 15 to 20 are timed, 21 is under torch's profiler, 22 to 24 under Python's
    settings = gpu.settings_of("kept", 512) | {"output_dir": tempfile.mkdtemp(), "max_steps": last}
    trainer, _ = gpu.our_trainer("kept", folder, data.select(range(gpu.BATCH * 22)), settings)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    by_torch, by_python, seconds = profile(activities=kinds), cProfile.Profile(), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            if 15 <= state.global_step <= 20:
                seconds.append(time.perf_counter() - self.begin)
            if state.global_step == 20:
                by_torch.start()
            if state.global_step == 21:
                by_torch.stop()
                by_python.enable()
            if state.global_step == last:
                by_python.disable()
            self.begin = time.perf_counter()

    trainer.add_callback(Watch())
    trainer.train()
    on_device = torch.autograd.DeviceType.CUDA
    kernels = [e for e in by_torch.events() if e.device_type == on_device and not e.is_user_annotation]
    busy = covered([(kernel.time_range.start, kernel.time_range.end) for kernel in kernels]) / 1e6
    step = statistics.median(seconds)
    averages = [e for e in by_torch.key_averages() if e.self_cpu_time_total]
    host = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:25]
    places = sorted(pstats.Stats(by_python).stats.items(), key=lambda item: -item[1][2])[:25]
    found = {
        "pairs_a_step": gpu.BATCH,
        "step_seconds": round(step, 4),
        "gpu_busy_seconds": round(busy, 4),
        "gpu_idle_share": round(1 - busy / step, 3),
        "kernels_a_step": len(kernels),
        "microseconds_a_kernel": round(step * 1e6 / len(kernels), 1),
        "host_operators": {e.key[:80]: [e.count, round(e.self_cpu_time_total / 1e6, 4)] for e in host},
        "python_functions": {
            f"{'/'.join(Path(file).parts[-3:])}:{line} {name}": [calls // 3, round(own / 3, 4)]
            for (file, line, name), (_, calls, own, _, _) in places
        },
        "versions": versions(),
        "machine": machine(),
        "cpu": gpu.cpu(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gpu"]:
        on_gpu(sys.argv[2])
    else:
        main()

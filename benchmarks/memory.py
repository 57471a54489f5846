"""The memory estimate against measured training steps: python benchmarks/memory.py

Each line is a process of its own: the machine's model (embedded, on a CPU), two steps of one micro-batch whose pairs
all have the length given (six tenths of it prompt), and the peak of memory above the loaded model: resident memory on a
CPU, torch's allocated memory on a GPU. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = [
    (2, 128, False),
    (4, 128, False),
    (8, 128, False),
    (4, 256, False),
    (2, 512, False),
    (4, 256, True),
    (8, 128, True),
    (2, 512, True),
]


def memory(peak: bool) -> int:
    """Bytes now, or at their highest so far."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM" if peak else "VmRSS")) * 1024


def measure(pairs: int, tokens: int, checkpointing: bool) -> dict:
    from helpers import Dataset, DPOConfig, add_lora, load_model
    from helpers.data.render import pair_lengths, tokenize_pairs
    from helpers.model.memory import estimate_for
    from helpers.train.settings import dpo_settings
    from helpers.train.trainer import make_trainer

    model, tokenizer = load_model()
    model = add_lora(model)

    def text(length: int) -> list[dict]:
        return [{"role": "user", "content": " cat" * length}]

    row = {
        "prompt": text(round(tokens * 0.6)),
        "chosen": text(round(tokens * 0.4)),
        "rejected": text(round(tokens * 0.4)),
    }
    for side in ("chosen", "rejected"):
        row[side][0]["role"] = "assistant"
    data = Dataset.from_list([row] * 2 * pairs)
    ids = tokenize_pairs(data, tokenizer)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        data = data.add_column(name, [-100.0] * len(data))
    settings = dpo_settings() | {
        "per_device_train_batch_size": pairs,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": checkpointing,
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    estimate = estimate_for(model, ids, settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, data, None, DPOConfig(output_dir=folder, **settings))
        before = memory(peak=False)
        trainer.train()
    return {
        "pairs": pairs,
        "tokens": max(pair_lengths(ids)),
        "checkpointing": checkpointing,
        "measured_gb": round((memory(peak=True) - before) / 1e9, 2),
        "estimated_gb": round(estimate.training / 1e9, 2),
    }


def main() -> None:
    from helpers.run.folder import machine, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(*CASES[args.case])))
        return
    results = []
    for number in range(len(CASES)):
        done = subprocess.run(
            [sys.executable, __file__, "--case", str(number)], stdout=subprocess.PIPE, check=True, text=True
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    print(json.dumps({"cases": results, "versions": versions(), "machine": machine()}))


if __name__ == "__main__":
    main()

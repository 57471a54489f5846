"""How long `check_pairs` takes; its floor is the same tokenizer over prompt, prompt + chosen and prompt + rejected.

    python benchmarks/check_pairs.py [--pairs 100000]

Pairs are made of the sentences of the bundled ones (seeded; three prompts in ten have an earlier turn). Both sides run
in one process: half of the floor, the check, the other half of the floor, so that a machine that grows slower favours
neither. The floor gets its texts already rendered. Memory is the peak of anonymous memory during the check above what
the process held after its first batch (half of the floor has run by then and left its own behind); the Arrow table is
mapped from disk and does not count. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from datasets import Dataset

from helpers import load_tokenizer
from helpers.data.check import check_pairs
from helpers.data.load import BUNDLED_PAIRS, load_pairs
from helpers.data.measure import BATCH

SMALL = 10_000


def write_pairs(path: Path, size: int) -> None:
    """A JSONL file of `size` pairs: prompts of 1 to 4 sentences, answers of 2 to 7."""
    rows = [json.loads(line) for line in BUNDLED_PAIRS.open(encoding="utf-8")]
    questions = [row["prompt"] for row in rows]
    sentences = [
        one
        for row in rows
        for side in ("chosen", "rejected")
        for one in row[side].rstrip(".").split(". ")
        if len(one) > 20
    ]
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return ". ".join(rng.choices(sentences, k=rng.randint(low, high))) + "."

    with path.open("w", encoding="utf-8") as file:
        for number in range(size):
            prompt = [{"role": "user", "content": f"{text(0, 3)} {rng.choice(questions)} ({number})"}]
            if rng.random() < 0.3:
                earlier = [("user", rng.choice(questions)), ("assistant", text(1, 4))]
                prompt = [{"role": role, "content": content} for role, content in earlier] + prompt
            sides = {name: [{"role": "assistant", "content": text(2, 7)}] for name in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": prompt, **sides}) + "\n")


class AnonymousMemory:
    """Peak of this process's anonymous memory in MB, looked at 50 times a second."""

    def __enter__(self) -> "AnonymousMemory":
        self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> float:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def floor_seconds(pairs: Dataset, tokenizer: Any) -> tuple[float, int]:
    """Seconds to tokenize the three texts of each pair, rendering not counted, and how many tokens they have."""
    seconds, tokens = 0.0, 0
    for start in range(0, len(pairs), BATCH):
        rows = pairs[start : start + BATCH]
        texts = [tokenizer.apply_chat_template(rows["prompt"], tokenize=False, add_generation_prompt=True)]
        for side in ("chosen", "rejected"):
            whole = [a + b for a, b in zip(rows["prompt"], rows[side], strict=True)]
            texts.append(tokenizer.apply_chat_template(whole, tokenize=False))
        begin = time.perf_counter()
        ids = [tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"] for batch in texts]
        seconds += time.perf_counter() - begin
        tokens += sum(len(one) for batch in ids for one in batch)
    return seconds, tokens


def measure(path: Path) -> dict[str, float]:
    """Seconds of both sides, and memory, for the pairs of one file."""
    tokenizer = load_tokenizer()
    begin = time.perf_counter()
    pairs = load_pairs(path)
    load_seconds = time.perf_counter() - begin
    check_pairs(pairs.select(range(BATCH)), tokenizer)  # imports, and the tokenizer's first call
    held = AnonymousMemory.now()
    first, first_tokens = floor_seconds(pairs.shard(2, 0, contiguous=True), tokenizer)
    with AnonymousMemory() as memory:
        begin = time.perf_counter()
        check_pairs(pairs, tokenizer)
        seconds = time.perf_counter() - begin
    second, second_tokens = floor_seconds(pairs.shard(2, 1, contiguous=True), tokenizer)
    floor = first + second
    begin = time.perf_counter()
    check_pairs(load_pairs(path), tokenizer)
    again = time.perf_counter() - begin
    return {
        "pairs": len(pairs),
        "tokens_per_pair": round((first_tokens + second_tokens) / len(pairs), 1),
        "load_seconds": round(load_seconds, 2),
        "seconds": round(seconds, 2),
        "floor_seconds": round(floor, 2),
        "ratio": round(seconds / floor, 3),
        "load_and_check_again_seconds": round(again, 2),
        "peak_mb": round(memory.peak - held, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (SMALL, args.pairs):
            path = Path(folder) / f"{size}.jsonl"
            write_pairs(path, size)
            # A process for each size, so that the memory of one is not in the other; nothing is left in the cache.
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(path)],
                env={**os.environ, "HF_DATASETS_CACHE": folder},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            results[size] = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(results[size]))
    small, large = results[SMALL], results[args.pairs]
    # Cost is linear if this is near 1. The floor's own value says how much of it is the machine.
    per_pair = {
        name: large[name] / large["pairs"] / (small[name] / small["pairs"]) for name in ("seconds", "floor_seconds")
    }
    large["cost_per_pair_against_10k"] = round(per_pair["seconds"], 3)
    large["floor_per_pair_against_10k"] = round(per_pair["floor_seconds"], 3)
    large["peak_mb_10k"] = small["peak_mb"]
    print(json.dumps(large))


if __name__ == "__main__":
    main()

"""Work before the first step, next to its floor: the same texts tokenised once, in batches.

    python benchmarks/prepare.py [--pairs 48000]

A file of pairs goes to the first batch that the trainer takes: loading, checking, tokenising, hashing, estimating
memory, making the trainer. The pass for the reference's log-probs is left out (they are zeros here). The floor
tokenises the three texts of each pair (prompt, prompt + chosen, prompt + rejected), already rendered; rendering is
timed apart. Pairs are made of the sentences of the bundled ones (seeded; three prompts in ten have an earlier turn).
Both sides run in one process: half of the floor, the work, the other half of the floor, so that a machine that grows
slower favours neither. Memory is the peak of anonymous memory above what the process held with its model loaded;
Arrow tables are mapped from disk and do not count. The model has two small layers. The last line is one JSON object.
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

import helpers  # first: Unsloth before transformers  # isort: skip
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.data.check import check_pairs
from helpers.data.load import BUNDLED_PAIRS, load_pairs
from helpers.data.render import BATCH, Renderer
from helpers.model.logps import PairLogps
from helpers.model.policy import Policy
from helpers.run.folder import machine, versions
from helpers.train import dpo
from helpers.train.job import Job, check_both
from helpers.train.settings import complete_settings

SMALL, HELD_OUT = 10_000, 500
RULE = {"max_prompt_length": 256, "on_long_prompt": "shorten"}


def write_pairs(path: Path, size: int, seed: int = 0) -> None:
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
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return ". ".join(rng.choices(sentences, k=rng.randint(low, high))) + "."

    with path.open("w", encoding="utf-8") as file:
        for number in range(size):
            prompt = [{"role": "user", "content": f"{text(0, 3)} {rng.choice(questions)} ({seed}-{number})"}]
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


def floor_seconds(pairs: Dataset, tokenizer: Any) -> dict[str, float]:
    """Seconds to render and to tokenise the three texts of each pair, and how many tokens they have."""
    renderer = Renderer(tokenizer)
    floor = {"render": 0.0, "tokenise": 0.0, "tokens": 0}
    for start in range(0, len(pairs), BATCH):
        rows = pairs[start : start + BATCH]
        begin = time.perf_counter()
        texts = [[renderer.text(prompt, {}, add_generation_prompt=True) for prompt in rows["prompt"]]]
        for side in ("chosen", "rejected"):
            talks = [a + b for a, b in zip(rows["prompt"], rows[side], strict=True)]
            texts.append([renderer.text(talk, {}) for talk in talks])
        rendered = time.perf_counter()
        ids = [tokenizer(batch, add_special_tokens=False, return_attention_mask=False)["input_ids"] for batch in texts]
        floor["render"] += rendered - begin
        floor["tokenise"] += time.perf_counter() - rendered
        floor["tokens"] += sum(len(one) for batch in ids for one in batch)
    return floor


def small_model(folder: str) -> Any:
    """A policy of two small layers with random weights, and its tokenizer."""
    tokenizer = helpers.load_tokenizer("embedded")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = helpers.load_model(folder)
    return helpers.add_lora(model), tokenizer


def zeros(size: int) -> PairLogps:
    return PairLogps(*torch.zeros(4, size, dtype=torch.float64))


def first_batch(model: Any, tokenizer: Any, path: Path, test: Dataset, folder: Path) -> dict[str, float]:
    """Seconds from the file to the first batch, part by part."""
    marks = [time.perf_counter()]
    pairs = load_pairs(path)
    marks.append(time.perf_counter())
    values = complete_settings(model, {})
    checked = check_both(pairs, test, tokenizer, values["max_length"], **RULE)
    marks.append(time.perf_counter())
    job = Job(Policy(model, tokenizer), None, checked, folder, values, {})
    job.earlier(replace=False)
    job.begin()
    marks.append(time.perf_counter())
    reference = {name: zeros(len(getattr(checked, name).ids)) for name in ("train", "test")}
    dpo.check_start = lambda trainer, settings: 0.0  # it would refuse these zeros
    trainer = dpo._trainer(job, reference, [])  # noqa: SLF001  (train_dpo, but for the reference's pass)
    batch = next(iter(trainer.get_train_dataloader()))
    marks.append(time.perf_counter())
    assert batch["input_ids"].shape[0] == 2 * values["per_device_train_batch_size"]
    names = ("load", "check", "job", "trainer")
    return {name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)}


def measure(path: Path, folder: Path) -> dict[str, float]:
    """Seconds of both sides, and memory, for the pairs of one file."""
    model, tokenizer = small_model(str(folder / "model"))
    small = load_pairs(path.with_name("test.jsonl"))
    check_pairs(small, tokenizer)  # imports, and the tokenizer's first call
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    half = Dataset.from_list(rows[::2]), Dataset.from_list(rows[1::2])
    del rows
    floors = [floor_seconds(half[0], tokenizer)]
    held = AnonymousMemory.now()
    with AnonymousMemory() as memory:
        parts = first_batch(model, tokenizer, path, small, folder / "first")
    floors.append(floor_seconds(half[1], tokenizer))
    floor = {name: floors[0][name] + floors[1][name] for name in floors[0]}
    seconds = sum(parts.values())
    return {
        "pairs": len(half[0]) + len(half[1]),
        "tokens_per_pair": round(floor["tokens"] / (len(half[0]) + len(half[1])), 1),
        "seconds": round(seconds, 2),
        **{f"{name}_seconds": round(value, 2) for name, value in parts.items()},
        "floor_tokenise_seconds": round(floor["tokenise"], 2),
        "floor_render_seconds": round(floor["render"], 2),
        "ratio": round(seconds / floor["tokenise"], 3),
        "ratio_with_rendering": round(seconds / (floor["tokenise"] + floor["render"]), 3),
        "peak_mb": round(memory.peak - held, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.measure.with_suffix(""))))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "test.jsonl", HELD_OUT, seed=1)
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
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    small, large = results
    # Cost is linear if this is near 1.
    growth = (large["seconds"] / large["pairs"]) / (small["seconds"] / small["pairs"])
    result = {"sizes": results, "cost_per_pair_against_10k": round(growth, 3)}
    print(json.dumps(result | {"versions": versions(), "machine": machine()}))


if __name__ == "__main__":
    main()

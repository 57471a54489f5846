"""The memory estimate against measured runs, and what is recognised as running out."""

import copy
import json
import mmap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, Qwen3Config

from benchmarks import gpu
from helpers.model.memory import (
    ESTIMATE_MARGIN,
    estimate_for,
    estimate_memory,
    free_memory,
    is_out_of_memory,
    keep_freed_memory,
    plan_batch,
    plan_for,
)

QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
RESULTS = json.loads((BENCHMARKS / "results" / "memory.json").read_text())
ON_A_GPU = json.loads((BENCHMARKS / "results" / "gpu.json").read_text())
FAIR = json.loads((BENCHMARKS / "results" / "gpu_expert.json").read_text())


# Two rows a pair, measured on an H100 before benchmarks/gpu.py was written: about 350 tokens a sequence, 446 at most.
@pytest.mark.parametrize(
    "pairs, checkpointing, gb", [(2, "unsloth", 3.33), (8, "unsloth", 4.38), (16, "unsloth", 5.78), (8, False, 28.8)]
)
def test_estimate_agrees_with_measured_gpu_runs(pairs, checkpointing, gb):
    estimate = estimate_memory(
        QWEN3_4B, pairs=pairs, tokens=446, checkpointing=checkpointing, load_in_4bit=True, optim="adamw_8bit"
    )
    assert estimate.total / 1e9 == pytest.approx(gb, rel=0.1)


@pytest.mark.parametrize("name", ["usual", "ours", "kept", "offloaded", "two_rows", "two_rows_kept"])
def test_estimate_agrees_with_the_gpu_benchmark(name):
    """Where both answers share a forward, the longest pair is taken for all, which is up to a quarter over."""
    estimate = gpu.estimate(QWEN3_4B, gpu.SIDES[name])
    assert 0.95 < estimate.total / 1e9 / ON_A_GPU["sides"][name]["peak_gb"] < 1.27


def gpu_policy(kind: str = "qwen3") -> SimpleNamespace:
    """What the estimate asks of a policy on a GPU."""
    config = copy.copy(QWEN3_4B)
    config.model_type = kind
    inner = SimpleNamespace(config=config, device=torch.device("cuda"), dtype=torch.bfloat16)
    lora = SimpleNamespace(r=16)
    return SimpleNamespace(**vars(inner), get_base_model=lambda: inner, peft_config={"default": lora})


def ids_of(*pairs: tuple[int, int, int]) -> Dataset:
    """Tokenised pairs of so many tokens: prompt, chosen, rejected."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([{name: [0] * n for name, n in zip(names, pair, strict=True)} for pair in pairs])


GPU_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "gradient_checkpointing": True}
GPU_STEP |= {"optim": "adamw_8bit", "max_length": 512}


def test_pairs_that_share_a_forward_count_their_prompt_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    capability = (9, 0)
    ids, settings = ids_of((100, 50, 150), (180, 20, 90)), GPU_STEP | {"gradient_checkpointing": False}

    def activations(kind: str) -> float:
        return estimate_for(gpu_policy(kind), ids, settings).activations

    # 300 tokens and seven times 295 or a little more, filled up to 19 times 128, against 16 rows of 270.
    assert activations("qwen3") / activations("gemma3") == pytest.approx(19 * 128 / (16 * 270))
    capability = (7, 5)
    assert activations("qwen3") == activations("gemma3")


DRAWN = ("ours", "kept", "ours_1024", "offloaded", "two_rows", "two_rows_offloaded", "long", "long_two_rows")


@pytest.mark.parametrize("name", DRAWN)
def test_estimate_for_pairs_as_they_are_drawn_is_at_most_a_tenth_over_the_peak(name, monkeypatch):
    side = gpu.SIDES[name]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if side["shared"] else (7, 5))
    longest = side.get("tokens", 512)
    count, spans = gpu.in_a_step(name) * gpu.DIFFERENT, side.get("words")
    drawn = gpu.make_pairs(lambda text, **options: {"input_ids": text.split()}, longest, count, spans)
    words = [[len(turn[0]["content"].split()) for turn in pair.values()] for pair in drawn]
    ids = ids_of(*((prompt + 12, chosen + 2, rejected + 2) for prompt, chosen, rejected in words))  # with the template
    policy = gpu_policy()
    policy.is_loaded_in_4bit = True
    step = {"gradient_checkpointing": side["checkpointing"], "max_length": longest}
    step["per_device_train_batch_size"] = side["pairs"]
    estimate = estimate_for(policy, ids, GPU_STEP | step).total
    runs = [host["sides"] | host.get("long", {}).get("sides", {}) for host in FAIR["hosts"]]
    peaks = [run[name]["peak_gb"] for run in [*runs, FAIR["another_host"]["sides"]] if name in run]
    assert peaks and all(1 <= estimate / 1e9 / peak < 1.1 for peak in peaks)


def test_plan_for_a_policy_takes_less_at_once_the_less_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    policy, ids = gpu_policy(), ids_of((150, 200, 200))

    def need(pairs: int, checkpointing: bool) -> float:
        step = {"per_device_train_batch_size": pairs, "gradient_checkpointing": checkpointing}
        return estimate_for(policy, ids, GPU_STEP | step).training

    steps = [(8, 1, False), (8, 1, True), (4, 2, True), (2, 4, True), (1, 8, True)]
    for step, larger in zip(steps[1:], steps, strict=False):
        free = need(larger[0], larger[2]) * ESTIMATE_MARGIN
        assert plan_for(policy, ids, GPU_STEP, free)[:3] == larger
        plan = plan_for(policy, ids, GPU_STEP, free * 0.999)
        assert plan[:3] == step and plan.bytes == need(step[0], step[2])
    assert "without checkpointing 17 GB would be needed" in plan_for(policy, ids, GPU_STEP, 20e9).reason
    nothing_fits = plan_for(policy, ids, GPU_STEP, 1e6)
    assert nothing_fits[:3] == (1, 8, True) and nothing_fits.reason == "no other way needs less"


@pytest.mark.parametrize(
    "case", RESULTS["cases"], ids=lambda c: f"{c['pairs']}x{c['tokens']}{'c' * c['checkpointing']}"
)
def test_estimate_agrees_with_measured_cpu_runs(case):
    estimate = estimate_memory(
        SMOLLM2_135M,
        pairs=case["pairs"],
        tokens=case["tokens"],
        checkpointing=case["checkpointing"],
        load_in_4bit=False,
        plain=True,
    )
    assert estimate.training / 1e9 == pytest.approx(case["measured_gb"], rel=0.2)


@pytest.mark.parametrize(
    "card, tokens, plan", [(80, 350, (8, 1, False)), (24, 350, (8, 1, True)), (8, 350, (8, 1, True)), (4, 350, None)]
)
def test_plan_takes_the_fastest_measured_setting_that_fits(card, tokens, plan):
    """In the benchmark, without checkpointing was the fastest, then eight pairs whole with it."""
    chosen = plan_batch(QWEN3_4B, card * 1e9, tokens=tokens)
    assert (chosen and chosen[:3]) == plan


@pytest.mark.parametrize("tokens", [512, 1024])
def test_plan_fits_with_room_and_needs_less_on_a_smaller_card(tokens):
    plans = [plan_batch(QWEN3_4B, card * 1e9, tokens=tokens) for card in (8, 16, 24, 80, 200)]
    for plan, card in zip(plans, (8, 16, 24, 80, 200), strict=True):
        assert plan.bytes * ESTIMATE_MARGIN <= card * 1e9 and plan.pairs * plan.pieces == 8
    assert [plan.bytes for plan in plans] == sorted(plan.bytes for plan in plans)
    assert not plans[-1].checkpointing
    small = plan_batch(QWEN3_4B, 8e9, tokens=1024)
    assert small.pieces > 1 and small.checkpointing and "in fewer pieces" in small.reason


@pytest.mark.slow
def test_free_memory_is_less_after_taking_some():
    before = free_memory(torch.device("cpu"))
    size = 3 * 10**9  # what the kernel says lags behind by some hundred megabytes
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    with mmap.mmap(-1, size, flags=flags):  # fresh pages: a tensor may be given memory that torch freed and glibc kept
        assert 2.2e9 < before - free_memory(torch.device("cpu")) < 3.8e9


def test_what_earlier_work_freed_is_free():
    keep_freed_memory()  # as load_model does
    used = psutil.Process().memory_info
    free_memory(torch.device("cpu"))
    before = used().rss
    work = [torch.ones(25_000_000), torch.ones(1_000_000), torch.ones(25_000_000)]
    kept = work[1]  # between the two that are freed
    del work
    assert used().rss - before > 150e6
    free_memory(torch.device("cpu"))
    assert used().rss - before < 50e6
    assert kept.sum() == 1e6


def test_running_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA driver error: out of memory"))  # a kernel that finds no room on a GPU
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value)

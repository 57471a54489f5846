"""Training runs made sick on purpose, and cured: python benchmarks/diagnosis.py [--seeds 3] [--only CASE ...]

Each case trains the embedded model for a few steps with a fault, and once more without it, which goes in the direction
of the cure that `diagnose` names, and not always as far. Then the advice that usual guides give is tried. About 25
minutes on two CPU cores. Finished runs are kept in outputs/diagnosis and not trained again, so an interrupted benchmark
goes on where it stopped. The last line is one JSON object with all histories and figures.
benchmarks/results/diagnosis.json is a list of such objects, from two machines.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers import Dataset, UserError, add_lora, load_model, load_pairs, split_pairs, train_dpo
from helpers.common import output_folder, write_json
from helpers.model.generate import generate_replies
from helpers.run.diagnosis import diagnose
from helpers.run.folder import Run, machine, read_info, versions

# isort: split
from peft import get_peft_model_state_dict, set_peft_model_state_dict  # after helpers: Unsloth comes first

# Eight steps of eight pairs. A learning rate above 03_train's makes up for so few.
HEALTHY = {
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 4,
    "per_device_eval_batch_size": 8,
}
TRAIN, TEST = 64, 40
NEW_TOKENS = 128  # of the replies that should end


def swapped(pairs: Dataset, every: int = 1) -> Dataset:
    """Chosen and rejected exchanged in each `every`-th pair."""
    return Dataset.from_list(
        [
            row | ({"chosen": row["rejected"], "rejected": row["chosen"]} if number % every == 0 else {})
            for number, row in enumerate(pairs)
        ]
    )


def half_swapped(pairs: Dataset) -> Dataset:
    return swapped(pairs, every=2)


def _cut_words(pairs: Dataset, words: Callable[[int], int]) -> Dataset:
    def cut(row: dict) -> dict:
        text = row["rejected"][0]["content"].split()
        return {"rejected": [{"role": "assistant", "content": " ".join(text[: words(len(text))])}]}

    return pairs.map(cut)


def curt(pairs: Dataset) -> Dataset:
    """Each rejected answer cut to its first word: length alone tells the sides apart."""
    return _cut_words(pairs, lambda count: 1)


def shorter(pairs: Dataset) -> Dataset:
    """Each rejected answer cut to a third of its words."""
    return _cut_words(pairs, lambda count: count // 3)


def few(pairs: Dataset) -> Dataset:
    return pairs.select(range(8))


@dataclass(frozen=True)
class Case:
    """A fault: `sick` and `data` are what it does to the healthy run, `cured` and `cured_data` what the cure leaves."""

    fault: str
    sick: dict = field(default_factory=dict)
    data: Callable[[Dataset], Dataset] | None = None
    cured: dict = field(default_factory=dict)
    cured_data: Callable[[Dataset], Dataset] | None = None
    test_too: bool = False  # the fault is in the held-out pairs as well
    sft: bool = False  # starts from an adapter that was fine-tuned on the chosen answers
    base_reference: bool = False  # the sick run's reference is a copy of the bare base model
    replies: bool = False  # count the replies that end


CONSTANT = {"lr_scheduler_type": "constant"}
FAST = {"learning_rate": 3e-3}
OVER = {"max_steps": 8} | FAST | CONSTANT

# By the code that diagnose gives.
CASES = {
    "healthy": Case("none", replies=True),
    "not_moving": Case("learning rate 1e-7", {"learning_rate": 1e-7}),
    "diverged": Case("learning rate 0.03", {"learning_rate": 3e-2} | CONSTANT),
    "nan": Case("learning rate 1e30", {"learning_rate": 1e30, "max_steps": 4} | CONSTANT),
    "below_half": Case("chosen and rejected exchanged", data=swapped),
    "no_preference": Case("exchanged in every second pair", data=half_swapped),
    "overfitting": Case("8 pairs, 8 epochs, learning rate 3e-3", OVER, few),
    "loss_zero": Case("8 pairs, 8 epochs", {"max_steps": 8} | CONSTANT, few),
    "leak": Case("rejected answers cut to one word", data=curt, test_too=True),
    # At this max_length the chosen answers lose their end and the rejected keep theirs.
    "never_ends": Case(
        "max_length 64, rejected a third as long", FAST | {"max_length": 64}, shorter, FAST, shorter, replies=True
    ),
    "chosen_falls": Case("learning rate 5e-3, beta 0.01", {"learning_rate": 5e-3, "beta": 0.01}),
    "wrong_reference": Case("an SFT policy against the bare base", sft=True, base_reference=True),
    "out_of_memory": Case(
        "micro-batch of 4,096 pairs", {"per_device_train_batch_size": 4096, "gradient_accumulation_steps": 1}
    ),
}

# What usual guides say, tried: sick is with the advice, cured without.
ADVICE = {
    "raise beta for a stronger signal": Case("beta 0.5 against 0.1", {"beta": 0.5}),
    "lower beta against overfitting": Case("beta 0.01 against 0.1", OVER | {"beta": 0.01}, few, OVER, few),
    "raise beta against overfitting": Case("beta 0.5 against 0.1", OVER | {"beta": 0.5}, few, OVER, few),
    "a separate reference for a stronger constraint": Case("a copy of the base model", base_reference=True),
}


def _keep(row: dict) -> dict:
    """Of a logged row what the diagnosis and its pictures need, with four digits; as text where it is no number."""
    wanted = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    names = ["step", "grad_norm", *wanted, *(f"eval_{name}" for name in wanted)]
    values = {name: float(f"{float(row[name]):.4g}") for name in names if name in row}
    values["step"] = int(row["step"])
    return {name: value if value - value == 0 else str(value) for name, value in values.items()}


def record(run: Run) -> dict:
    """A run as plain JSON, small."""
    settings = ("beta", "learning_rate", "loss_type", "num_train_epochs", "max_steps", "max_length", "fp16", "bf16")
    settings += ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "warmup_steps")
    info = {name: getattr(run.info, name) for name in ("status", "steps", "train_pairs", "test_pairs", "memory_gb")}
    info |= {"data": {"findings": run.info.data.findings}}
    info |= {"config": {name: run.info.config[name] for name in settings}}
    metrics = {
        name: [round(v, 4) for v in value] if isinstance(value, (list, tuple)) else round(value, 4)
        for name, value in run.metrics.items()
    }
    metrics = json.loads(json.dumps(metrics), parse_constant=str)
    return {"history": [_keep(row) for row in run.history if "step" in row], "metrics": metrics, "info": info}


class Bench:
    """One loaded model with its pairs; trains cases, each from an adapter that is fresh for its seed."""

    def __init__(self, base, tokenizer, folder: Path):
        self.base, self.tokenizer, self.folder = base, tokenizer, folder
        parts = split_pairs(load_pairs(), seed=0)
        self.train, self.test = parts["train"].select(range(TRAIN)), parts["test"].select(range(0, 3 * TEST, 3))

    def start(self, seed: int) -> None:
        self.seed = seed
        self.policy = add_lora(self.base, seed=seed)
        self.starts = {"fresh": self._adapter()}
        self.labels = {self._key(CASES["healthy"], False): f"healthy-{seed}"}

    def end(self) -> None:
        self.base = self.policy.unload()
        if hasattr(self.base, "peft_config"):
            del self.base.peft_config

    def _key(self, case: Case, sick: bool) -> tuple:
        """What decides a run of this seed."""
        settings, make = (case.sick, case.data) if sick else (case.cured, case.cured_data)
        return json.dumps(settings), make, bool(make and case.test_too), case.sft, sick and case.base_reference

    def _adapter(self) -> dict:
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(self.policy).items()}

    def _sft(self) -> dict:
        """The adapter after four steps on the chosen answers alone: TRL's DPOTrainer has that as a loss too."""
        if "sft" not in self.starts:
            set_peft_model_state_dict(self.policy, self.starts["fresh"])
            settings = HEALTHY | {"learning_rate": 1e-3, "max_steps": 4, "loss_type": ["sft"], "seed": self.seed}
            pairs = self.train.select(range(32))
            train_dpo(self.policy, self.tokenizer, pairs, self.test, self.folder / f"sft-{self.seed}", **settings)
            self.starts["sft"] = self._adapter()
        return self.starts["sft"]

    def run(self, name: str, state: str) -> tuple[Run, str]:
        """The run of a case, "sick" or "cured", and the name of its folder."""
        case, sick = (CASES | ADVICE)[name], state == "sick"
        settings, make = (case.sick, case.data) if sick else (case.cured, case.cured_data)
        train = make(self.train) if make else self.train
        test = make(self.test) if make and case.test_too else self.test
        # Runs that agree are one: most cures are the healthy run.
        label = self.labels.setdefault(self._key(case, sick), f"{name}-{state}-{self.seed}".replace(" ", "_"))
        set_peft_model_state_dict(self.policy, self._sft() if case.sft else self.starts["fresh"])
        reference = load_model("embedded")[0] if sick and case.base_reference else None
        settings = HEALTHY | {"seed": self.seed} | settings
        folder = self.folder / label
        try:
            run = train_dpo(self.policy, self.tokenizer, train, test, folder, ref_model=reference, **settings)
        except UserError:
            if name not in ("out_of_memory", "nan"):
                raise
            run = Run(folder, read_info(folder), [], {}, None)
        return run, label

    def ended(self) -> float:
        """Share of greedy replies to held-out prompts that end within NEW_TOKENS tokens."""
        prompts = self.test["prompt"][:]
        replies = generate_replies(self.policy, self.tokenizer, prompts, max_new_tokens=NEW_TOKENS)
        return sum(reply.ended for reply in replies) / len(replies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[*CASES, *ADVICE], metavar="CASE")
    args = parser.parse_args()
    bench = Bench(*load_model("embedded"), output_folder("diagnosis"))
    bench.folder.mkdir(parents=True, exist_ok=True)
    runs, cases = {}, []
    for seed in range(args.seeds):
        bench.start(seed)
        for name in args.only or [*CASES, *ADVICE]:
            for state in ("sick", "cured") if name != "healthy" else ("cured",):
                run, label = bench.run(name, state)
                runs.setdefault(label, record(run))
                if (CASES | ADVICE)[name].replies:
                    kept = bench.folder / f"{label}-ended.json"
                    if not kept.exists():
                        write_json(kept, bench.ended())
                    runs[label]["metrics"]["ended"] = json.loads(kept.read_text())
                fault = (CASES | ADVICE)[name].fault
                cases.append({"case": name, "fault": fault, "state": state, "seed": seed, "run": label})
                print(name, state, seed, diagnose(run), flush=True)
        bench.end()
    print(json.dumps({"cases": cases, "runs": runs, "versions": versions(), "machine": machine()}))


if __name__ == "__main__":
    main()

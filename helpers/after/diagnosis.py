"""Diagnosis of a training run: the symptom by name, with its numbers, its likely causes in order, and the cure.

All is read from what a run folder holds (history, metrics, info); no model is loaded. `measure` turns it into a few
numbers, `LIMITS` says from where on a number is a symptom, `CATALOGUE` what is behind it.
"""

import collections
import html
import math
from dataclasses import dataclass
from pathlib import Path

from helpers.run.folder import Run, read_info
from helpers.run.metrics import wilson_interval

# From where on a number of `measure` is a symptom. Each limit stands between the runs of benchmarks/diagnosis.py that
# have the symptom and those that are well, with room on both sides: tests/test_diagnosis.py holds it.
LIMITS = {
    "start_off": 1.0,  # nats; rounding in 16 bits gives tenths, a model that was trained in between gives many
    "moved": 0.3,  # nats; a run that stands still has rounding only
    "loss_end": 1.5,  # nats; twice the loss of not knowing
    "loss_half": 0.1,  # nats; half of the steps do not bring a healthy run near 0
    "accuracy_first": 0.9,  # too good to be true after a third of a run
    "accuracy_end": 0.6,  # low, where the interval holds a coin's 0.5 as well
    "loss_rise": 0.03,  # nats; between two evaluations the held-out loss also wavers
    "chosen_fall": 0.15,  # share of the chosen's log-prob; some fall is usual, the loss asks for a difference only
    "cut": 0.2,  # share of the training pairs
}
ENOUGH_PAIRS = 30  # held out; below, the interval of an accuracy is wider than 0.34 and tells little from chance
# code: (what is seen, likely causes in order, each with its cure, the test that decides between them)
SYMPTOMS: dict[str, tuple[str, tuple[tuple[str, str], ...], str]] = {
    "out_of_memory": (
        "Out of memory.",
        (
            ("The micro-batch is too large", "halve per_device_train_batch_size, double gradient_accumulation_steps"),
            ("Activations of all layers are kept", "gradient_checkpointing=True"),
            ("Long pairs", "lower max_length, after a look at check_pairs: cut answers lose their end"),
        ),
        "estimate_memory gives the need of each change without a step.",
    ),
    "nan": (
        "Loss or scores are not a number (NaN).",
        (
            ("The learning rate is far too high", "the default of dpo_settings(), with warm-up"),
            ("16-bit floats without range (fp16)", "bf16=True, or 32 bits"),
        ),
        "Train 5 steps with the default learning rate: if NaN comes at step 1 already, look at the model's precision.",
    ),
    "wrong_reference": (
        "Training does not start at ln 2 = 0.693: policy and reference differ before the first step.",
        (
            ("ref_model is another model than the policy's start", "leave ref_model out"),
            ("The policy was changed after the reference's log-probs were taken", "take them again"),
        ),
        "Compare log-probs of ten pairs under the reference and under the policy's start, as 03_train does.",
    ),
    "diverged": (
        "The loss is far above ln 2 = 0.693: training breaks the model.",
        (
            ("The learning rate is too high", "a tenth of it; the default of dpo_settings()"),
            ("No warm-up: the first steps are the largest", "warmup_steps=0.1"),
        ),
        "Train 5 steps with a tenth of the learning rate.",
    ),
    "loss_zero": (
        "The training loss falls to 0 at once.",
        (
            ("A few pairs, seen again and again, are learned by heart", "more pairs, one epoch, a lower learning rate"),
            ("Something on the surface tells the sides apart", "look at check_pairs"),
        ),
        "Held-out accuracy: near 1 it is the surface (a leak), far below it is learned by heart.",
    ),
    "leak": (
        "Accuracy is 1.0 at once, on pairs that were not trained on too: too easy.",
        (
            ("Something on the surface, such as length, tells chosen from rejected", "bring it into both sides"),
            ("Held-out pairs are nearly the same as training pairs", "split by topic: split_pairs"),
        ),
        "check_pairs(train, tokenizer, test=test): does a feature alone reach the accuracy?",
    ),
    "below_half": (
        "Margins grow in training while held-out accuracy falls below a coin's 0.5.",
        (("Chosen and rejected are exchanged in the training set, or in the held-out one", "exchange them back"),),
        "Read ten pairs of each set: which answer is better?",
    ),
    "overfitting": (
        "Overfitting: the training loss falls while the held-out loss rises.",
        (
            ("Too few pairs seen too often", "more pairs, fewer epochs"),
            ("The learning rate is too high for so many steps", "halve it, or early_stopping=1"),
        ),
        "One epoch on all pairs: if the held-out loss still rises, it is the learning rate.",
    ),
    "chosen_falls": (
        "The margin grows, and the chosen answers become far less likely as well.",
        (
            ("The learning rate is too high", "a tenth of it"),
            ("beta is too low to hold the policy near the reference", "beta=0.1"),
            ("Chosen and rejected share most of their tokens", 'loss_type=["sigmoid", "sft"]'),
        ),
        "Change one at a time: first the learning rate, then beta.",
    ),
    "not_moving": (
        "The loss stays at ln 2 = 0.693; chosen and rejected scores stay similar, since nothing moves.",
        (
            ("The learning rate is too low for so few steps", "ten times as much, or more steps"),
            ("The adapter is not trained", "model.print_trainable_parameters() must not be 0"),
        ),
        "The gradient's norm: above 0 it is the learning rate.",
    ),
    "no_preference": (
        "Accuracy stays low: chosen and rejected scores move, but not apart.",
        (
            ("The labels contradict each other", "read twenty pairs without their labels, judge, compare"),
            ("Too few pairs, or too few steps, for what is to be learned", "more of them"),
        ),
        "Train on 8 of the pairs for 10 epochs: if their margin grows, the model can learn and the labels disagree.",
    ),
    "never_ends": (
        "Replies may never end: the ends of many training answers, with their EOS, were cut off.",
        (("max_length is too small for these pairs", "raise max_length, or leave the long pairs out"),),
        "Count the replies that end: generate_replies(...), its field `ended`.",
    ),
}
# What a symptom brings with it, which is then not named as well.
EXPLAINS = {
    "diverged": ("below_half", "overfitting", "chosen_falls", "no_preference"),
    "leak": ("loss_zero",),
    "below_half": ("overfitting",),
    "never_ends": ("no_preference",),
    "overfitting": ("loss_zero", "chosen_falls", "no_preference"),
}


@dataclass(frozen=True)
class Symptom:
    """One thing that is wrong with a run.

    `what` is seen, `evidence` gives the numbers, `causes` are pairs (cause, its cure), the likeliest first; `test`
    decides between them, where the history cannot.
    """

    code: str
    what: str
    evidence: str
    causes: tuple[tuple[str, str], ...]
    test: str

    @property
    def cure(self) -> str:
        """Of the likeliest cause."""
        return self.causes[0][1]

    @property
    def decides(self) -> str:
        """What `test` is for."""
        return "The history cannot decide between these. A test:" if len(self.causes) > 1 else "To make sure:"


class Diagnosis:
    """The symptoms of a run. It prints as text, and as escaped HTML in a notebook.

    `findings`: list of Symptom, what hides others first. `unseen`: what this run's history could not show, and what
    would.
    """

    def __init__(self, findings: list[Symptom], unseen: list[str]):
        self.findings, self.unseen = findings, unseen

    @property
    def codes(self) -> list[str]:
        """Names of the symptoms, in the order of `findings`."""
        return [finding.code for finding in self.findings]

    def _summary(self) -> str:
        count = len(self.findings)
        return f"{count} symptom{'s' * (count > 1)} found." if count else "No symptom found."

    def __str__(self) -> str:
        lines = [self._summary()]
        for finding in self.findings:
            lines += ["", f"{finding.code}: {finding.what}", f"  evidence: {finding.evidence}"]
            lines += [f"  cause {place}: {why}. Cure: {cure}." for place, (why, cure) in enumerate(finding.causes, 1)]
            lines += [f"  {finding.decides} {finding.test}"]
        return "\n".join(lines + [f"Not judged: {text}" for text in self.unseen])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        e = html.escape
        parts = [f"<p>{self._summary()}</p>"]
        for finding in self.findings:
            causes = "".join(f"<li>{e(why)}. <b>Cure:</b> {e(cure)}.</li>" for why, cure in finding.causes)
            parts.append(
                f"<p><code>{e(finding.code)}</code> <b>{e(finding.what)}</b><br>{e(finding.evidence)}</p>"
                f"<ol>{causes}</ol><p>{e(finding.decides)} {e(finding.test)}</p>"
            )
        return "".join(parts + [f"<p>Not judged: {e(text)}</p>" for text in self.unseen])


def _values(rows: list[dict], name: str) -> list[float]:
    """Of the rows that have it; text such as "nan" is read as the number that it stands for."""
    return [float(row[name]) for row in rows if name in row]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measure(history: list[dict], info: dict) -> dict[str, float]:
    """The numbers that a diagnosis rests on; those that the history does not give are left out.

    Log-ratios are means over pairs in nats: TRL's rewards divided by beta. "start" is step 1, whose loss is taken
    before its update; "end" is the last held-out evaluation, or for training a mean over the last half of its rows.

    Args:
        history, info: as in `Run`.
    """
    beta = float(info["config"]["beta"])
    train, held = ([row for row in history if name in row] for name in ("loss", "eval_loss"))
    found = {"pairs": info["test_pairs"], "findings_cut": info["data"].get("findings", {}).get("over_max_length", 0)}
    found["cut"] = found["findings_cut"] / max(info["train_pairs"], 1)
    curves = [float(row[name]) for row in train + held for name in row if name.endswith(_CURVES)]
    found["not_numbers"] = sum(not math.isfinite(value) for value in curves)
    if train and train[0]["step"] <= 1:
        scores = [float(train[0][f"rewards/{side}"]) / beta for side in ("chosen", "rejected")]
        found |= {"start_loss": float(train[0]["loss"]), "start_off": max(map(abs, scores))}
    if train:
        half = math.ceil(len(train) / 2)
        found |= {
            "loss_half": _mean(_values(train[:half][-2:], "loss")),
            "loss_end": _mean(_values(train[-half:], "loss")),
            "margin_end": _mean(_values(train[-half:], "rewards/margins")),
            "gradient": max(_values(train, "grad_norm"), default=math.nan),
        }
    if train or held:
        # One training batch is rounded by as much as a run that stands still seems to move; a mean of many is not.
        rows, prefix = (held[-1:], "eval_") if held else (train[-half:], "")
        chosen, rejected = (_mean(_values(rows, f"{prefix}rewards/{side}")) / beta for side in ("chosen", "rejected"))
        found |= {"chosen_end": chosen, "rejected_end": rejected, "moved": max(abs(chosen), abs(rejected))}
        found["gap"] = chosen - rejected
        found["chosen_fall"] = chosen / (_mean(_values(rows, f"{prefix}logps/chosen")) - chosen)
    if held:
        losses, accuracies = _values(held, "eval_loss"), _values(held, "eval_rewards/accuracies")
        found |= {
            "held_loss_best": min(losses),
            "held_loss_end": losses[-1],
            "loss_rise": losses[-1] - min(losses),
            "accuracy_first": accuracies[0],
            "accuracy_best": max(accuracies),
            "accuracy_end": accuracies[-1],
        }
    return found


_CURVES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


def _symptoms(found: dict[str, float], info: dict) -> dict[str, str]:
    """code -> evidence; what explains others comes first."""
    f = collections.defaultdict(lambda: math.nan, found)  # a comparison with NaN is false: what is not there is no sign
    config, limit = info["config"], LIMITS
    if info["status"] == "out of memory":
        memory = info["memory_gb"]
        return {
            "out_of_memory": f"training needs about {memory['needed']:.1f} GB beside the loaded model, "
            f"{memory['free']:.1f} GB were free; micro-batch of {config['per_device_train_batch_size']} pairs, "
            f"max_length {config['max_length']}, gradient checkpointing "
            + ("on" if config["gradient_checkpointing"] else "off")
        }
    if f["not_numbers"] > 0:
        return {
            "nan": f"{f['not_numbers']:.0f} logged values are not finite. (The trainer logs the loss of such a step as "
            "0, or as the mean so far: look at the margins.)"
        }
    low, high = _interval(f)
    moves = f["moved"] >= limit["moved"]
    log_ratios = f"log-ratios at the end {f['chosen_end']:+.2f} (chosen) and {f['rejected_end']:+.2f} (rejected) nats"
    accuracy = f"held-out accuracy {f['accuracy_end']:.2f} (95% interval {low:.2f} to {high:.2f})"
    held_loss = f"held-out loss {f['held_loss_best']:.3f} at its best, {f['held_loss_end']:.3f} at the end"
    if "accuracy_end" not in found:
        accuracy = held_loss = "no held-out evaluation"
    fading = f"held-out accuracy {f['accuracy_best']:.2f} at its best, {f['accuracy_end']:.2f} at the end"
    tests = {
        "wrong_reference": (
            f["start_off"] > limit["start_off"],
            f"loss {f['start_loss']:.3f} at step 1; policy and reference are {f['start_off']:.1f} nats apart on a side",
        ),
        "diverged": (
            _ln2(info) and f["loss_end"] > limit["loss_end"],
            f"training loss {f['loss_end']:.2f} in the last half, {held_loss}",
        ),
        "leak": (
            f["accuracy_first"] > limit["accuracy_first"] and f["pairs"] >= ENOUGH_PAIRS,
            f"held-out accuracy {f['accuracy_first']:.2f} at the first evaluation",
        ),
        "below_half": (
            moves and high < 0.5 and f["accuracy_best"] < 0.5,
            f"{accuracy}, while training margins are {f['margin_end']:+.3f}",
        ),
        "overfitting": (
            f["loss_rise"] > limit["loss_rise"] and f["loss_end"] < f["held_loss_best"],
            f"{held_loss}, training loss {f['loss_end']:.3f}; {fading}; training margins {f['margin_end']:+.2f}",
        ),
        "loss_zero": (
            _ln2(info) and f["loss_half"] < limit["loss_half"],
            f"training loss {f['loss_half']:.4f} half-way; {accuracy}",
        ),
        "chosen_falls": (
            f["chosen_fall"] > limit["chosen_fall"] and f["chosen_end"] > f["rejected_end"],
            f"{log_ratios}; the chosen lost {f['chosen_fall']:.0%} of their log-prob",
        ),
        "not_moving": (
            f["moved"] < limit["moved"],
            f"training loss {f['loss_end']:.3f} in the last half; {log_ratios}; largest norm of the gradient "
            f"{f['gradient']:.3g}",
        ),
        "never_ends": (
            f["cut"] > limit["cut"],
            f"{f['findings_cut']} of {info['train_pairs']} training pairs are over max_length {config['max_length']}",
        ),
        "no_preference": (
            moves and low < 0.5 <= high and f["accuracy_end"] < limit["accuracy_end"] and f["pairs"] >= ENOUGH_PAIRS,
            f"{accuracy}; {log_ratios}",
        ),
    }
    stated = {code: evidence for code, (holds, evidence) in tests.items() if holds}
    for code, explained in EXPLAINS.items():
        if code in stated:
            stated = {other: evidence for other, evidence in stated.items() if other not in explained}
    return stated


def _causes(code: str, found: dict[str, float], info: dict) -> tuple[tuple[str, str], ...]:
    """The catalogue's causes without those that the run's own numbers rule out, the likelier first."""
    config, findings = info["config"], info["data"].get("findings", {})
    surface = any(name in findings for name in ("length_leak", "feature_leak", "length_ratio"))
    gradient = found.get("gradient", math.nan)
    ruled_out = {
        ("nan", 1): not config.get("fp16"),
        ("loss_zero", 1): found.get("accuracy_first", 1) <= LIMITS["accuracy_first"],
        ("not_moving", 0): gradient == 0,
        ("not_moving", 1): gradient > 0,
        ("out_of_memory", 0): config["per_device_train_batch_size"] == 1,
        ("out_of_memory", 1): bool(config["gradient_checkpointing"]),
    }
    causes = [cause for place, cause in enumerate(SYMPTOMS[code][1]) if not ruled_out.get((code, place))]
    if (code == "leak" and not surface) or (code == "loss_zero" and surface):
        causes.reverse()
    return tuple(causes)


def _ln2(info: dict) -> bool:
    """Whether the loss starts at ln 2 and has the scale of the limits."""
    return info["config"]["loss_type"] in ("sigmoid", ["sigmoid"])


def _interval(f: dict[str, float]) -> tuple[float, float]:
    if math.isnan(f["accuracy_end"]) or not f["pairs"]:
        return math.nan, math.nan
    return wilson_interval(round(f["accuracy_end"] * f["pairs"]), f["pairs"])


def _unseen(found: dict[str, float], info: dict) -> list[str]:
    """What this history could not show, and what would."""
    if info["status"] == "out of memory":
        return []
    unseen = []
    if "loss_end" not in found:
        unseen.append("anything about training: no step was logged. Set logging_steps below the number of steps.")
    elif "start_off" not in found:
        unseen.append("whether policy and reference were equal before training: pass logging_first_step=True.")
    if "accuracy_end" not in found:
        unseen.append("overfitting, leaks and low accuracy: no held-out evaluation. Set eval_steps below the steps.")
    elif found["pairs"] < ENOUGH_PAIRS:
        unseen.append(f"low accuracy: {found['pairs']} held-out pairs are too few to tell it from chance.")
    if not _ln2(info):
        unseen.append("the height of the loss: its limits are for loss_type sigmoid.")
    return unseen


def diagnose(run: Run | str | Path) -> Diagnosis:
    """What is wrong with a training run, from its history and data report alone.

    Args:
        run: a Run, or a run folder; one that ran out of memory has no Run, but its folder can be diagnosed.

    Raises:
        UserError: no run folder, or an unfinished run.
    """
    if not isinstance(run, Run):
        folder = Path(run)
        info = read_info(folder)
        ended = info is not None and info.get("status") == "out of memory"
        run = Run(folder, info, [], {}, None) if ended else Run.load(folder)
    found = measure(run.history, run.info)
    findings = [
        Symptom(code, SYMPTOMS[code][0], evidence, _causes(code, found, run.info), SYMPTOMS[code][2])
        for code, evidence in _symptoms(found, run.info).items()
    ]
    return Diagnosis(findings, _unseen(found, run.info))

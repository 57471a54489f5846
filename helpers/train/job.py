"""What one call of `train_dpo` has to do, before it does it: its pairs, its settings, and what is in its folder."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from helpers.common import UserError
from helpers.data.check import check_pairs
from helpers.data.findings import Report
from helpers.data.render import pair_lengths
from helpers.data.report import load_report
from helpers.model.memory import BATCH_SETTINGS, ESTIMATE_MARGIN, BatchPlan, estimate_for, free_memory, plan_for
from helpers.model.policy import Policy
from helpers.model.profiles import current_profile
from helpers.run.folder import (
    POLICY_AT_START,
    DataInfo,
    RunInfo,
    Status,
    describe_config,
    machine,
    read_info,
    set_aside,
    versions,
    write_info,
)
from helpers.session import quiet_progress
from helpers.train import say
from helpers.train.processes import check_alike, once, processes, share_step
from helpers.train.resume import differences, step_of
from helpers.train.settings import DPOConfig, hardly_moves, run_config


class CheckedPairs(NamedTuple):
    """Pairs that were checked for a tokenizer: the reports of both sets, and the rule for long prompts."""

    train: Report
    test: Report
    rule: dict[str, Any]

    sets = property(lambda self: {"train": self.train, "test": self.test})


def check_both(
    train: Dataset, test: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, **rule: Any
) -> CheckedPairs:
    """Check both sets by `check_pairs` with its `rule`; UserError for errors, a line for long prompts."""
    for name, given in (("train", train), ("test", test)):
        if not isinstance(given, Dataset):
            raise UserError(say("no_pairs", name=name, kind=type(given).__name__))
    reports = (
        check_pairs(train, tokenizer, max_length, test=test, **rule),
        check_pairs(test, tokenizer, max_length, **rule),
    )
    for name, report in zip(("training", "held-out"), reports, strict=True):
        report.raise_for_errors()
        if any(report.prompts.values()):
            print(say("long_prompts", name=name, checked=report.checked, **report.prompts, **rule))
    return CheckedPairs(*reports, rule)


def _hash_without_date(pairs: CheckedPairs, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of rows and template, if this writes today's date, so that the tokens are others tomorrow; else nothing."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return ""
    rows = [tokenizer.chat_template, *pairs.train.pairs, *pairs.test.pairs]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:20]


@dataclasses.dataclass
class Job:
    """One call of `train_dpo`."""

    policy: Policy
    reference: Policy | None  # passed as `ref_model`; None if the reference is the policy at its start
    pairs: CheckedPairs
    folder: Path
    values: dict[str, Any]  # DPOConfig settings, complete, of all processes together
    settings: dict[str, Any]  # those that the caller gave
    info: RunInfo = dataclasses.field(init=False)  # as it will be in run.json
    plan: BatchPlan | None = None  # by free memory; None if the settings or an earlier run say how a step is made

    # By `values` as they are now: of this process's trainer; as in one process, so that any number can go on.
    config = property(lambda self: self._config(share_step(self.values)))
    described = property(lambda self: describe_config(self._config(self.values)))
    tokens = property(lambda self: self.folder / "tokens", doc="Of a run whose template writes the date.")

    def _config(self, share: dict[str, Any]) -> DPOConfig:
        return run_config(self.folder, len(self.pairs.train.pairs), self.values, share)

    def __post_init__(self) -> None:
        train, test = self.pairs.train, self.pairs.test
        loaded, number = [load_report(report.pairs) for report in (train, test)], processes().num_processes
        share_step(self.values)
        self.info = RunInfo(
            model=self.policy.name,
            profile=current_profile().name,
            config=self.described,
            train_pairs=len(train.pairs),
            test_pairs=len(test.pairs),
            data=DataInfo(
                train.hash,
                test.hash,
                {one.code: one.count for one in train.findings},
                train.prompts,
                bundled=all(one is not None and one.bundled for one in loaded),
                reading=loaded[0].reading if loaded[0] else [],
                given=_hash_without_date(self.pairs, self.policy.tokenizer),
            ),
            base=self.policy.base,
            start=self.policy.adapter,
            reference=POLICY_AT_START if self.reference is None else self.reference.fingerprint,
            versions=versions(),
            machine=machine() if number == 1 else f"{number} x {machine()}",
            status=Status.RUNNING,
            template=self.policy.options,
            prompts_rule=self.pairs.rule,
        )
        facts = {"model": self.info.base, "adapter": self.info.start, "settings": self.info.config}
        check_alike(**facts, pairs=(train.hash, test.hash))

    def earlier(self, replace: bool) -> RunInfo | None:
        """The same run as it was left in the folder, if it is there; decides how a step is made.

        Another run is put aside if `replace`, else UserError is raised.
        """
        free = min(gather_object([free_memory(self.policy.device)]))  # of the fullest card
        before, self.values, self.info, self.plan = once(
            lambda: (self._earlier(replace, free), self.values, self.info, self.plan)
        )
        if before is not None and self.tokens.is_dir():  # those that it began with
            for name, report in self.pairs.sets.items():
                report.take(Dataset.load_from_disk(str(self.tokens / name)))
        return before

    def _earlier(self, replace: bool, free: float) -> RunInfo | None:
        try:
            before = read_info(self.folder)
        except UserError:  # run.json can't be read, or lacks something
            if not replace:
                raise
            set_aside(self.folder)
            before = None
        if before is None:
            self._choose_step(None, free)
            return None
        worth = before.status == Status.FINISHED or any(self.folder.glob("checkpoints/checkpoint-*"))
        if self.tokens.is_dir() and before.data.given == self.info.data.given:
            self.info.data = before.data
        self._choose_step(before if worth else None, free)
        changed = differences(before, self.info)
        if not changed:
            return before
        if worth and not replace:
            raise UserError(say("other_run", folder=self.folder, changed="; ".join(changed[:3])))
        set_aside(self.folder)
        return None

    def _need(self, change: dict[str, Any] | None = None) -> float:
        """GB beside the loaded model, by the estimate, with a `change` of the settings."""
        values = share_step(self.values | (change or {}))
        return estimate_for(self.policy.model, self.pairs.train.ids, values).training / 1e9

    def _choose_step(self, before: RunInfo | None, free: float) -> None:
        """On a GPU, how a step's pairs are cut: as the run `before` did, else by free memory, unless it was given."""
        if self.policy.device.type == "cuda" and not self.settings.keys() & set(BATCH_SETTINGS):
            step = step_of(before, self.info)
            if step is None:
                self.plan = plan_for(self.policy.model, self.pairs.train.ids, share_step(self.values), free)
                size, pieces, checkpointing = self.plan[:3]
                pieces *= processes().num_processes
                step = dict(zip(BATCH_SETTINGS, (size, pieces, checkpointing), strict=True))
            self.values |= step
            self.info.config = self.described
        self.info.memory_gb = {"needed": round(self._need(), 2), "free": round(free / 1e9, 2)}

    def begin(self) -> None:
        """Say how a step is made, write run.json; UserError if training needs far more memory than is free."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".*.????????"):  # of a call that was killed while it wrote
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        if self.info.data.given and not (self.folder / "run.json").exists():
            for name, report in self.pairs.sets.items():
                with quiet_progress(len(report.ids)):
                    report.ids.save_to_disk(self.tokens / name)
        need, free, plan = self.info.memory_gb["needed"], self.info.memory_gb["free"], self.plan
        if plan is not None:
            words = {"s": "s" * (plan.pairs > 1), "checkpointing": "on" if plan.checkpointing else "off"}
            print(say("plan", plan=plan, needed=plan.bytes / 1e9, free=free, **words))
        alpha = self.policy.model.active_peft_config.lora_alpha
        if slow := hardly_moves(self.values, len(self.pairs.train.pairs), alpha):
            print(slow)
        if need >= free:
            text = f"Training needs about {need:.1f} GB beside the loaded model, and {free:.1f} GB are free."
            if need > ESTIMATE_MARGIN * free:
                self.write(Status.OUT_OF_MEMORY)
                raise UserError(f"{text}\n{self.savings()}")
            print(f"{text} It may not fit.\n{self.savings()}")
        self.write(Status.RUNNING)

    def write(self, status: Status) -> None:
        """Write run.json with this `status`."""
        write_info(self.folder, dataclasses.replace(self.info, status=status))

    def savings(self) -> str:
        """What to change if memory is short, each with what it saves by the estimate."""
        size, pieces, checkpointing = (self.values[name] for name in BATCH_SETTINGS)
        lengths = pair_lengths(self.pairs.train.ids)
        half = min(int(lengths.max()), self.values["max_length"]) // 2
        halved = {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": pieces * 2}
        changes = [
            (not checkpointing, {"gradient_checkpointing": True}, "slower"),
            (size > 1, halved, "the same effective batch"),
            (True, {"max_length": half}, f"cuts {int((lengths > half).sum())} of {len(lengths)} pairs"),
        ]
        lines = ["What to change in the call, and what it saves:"]
        for _, change, note in (one for one in changes if one[0]):
            text = ", ".join(f"{name}={value}" for name, value in change.items())
            lines.append(f"- {text} ({note}): {self._need() - self._need(change):.1f} GB")
        return "\n".join(lines)

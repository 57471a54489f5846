"""What one call of `train_dpo` has to do, before it does it: its pairs, its settings, and what is in its folder."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from datasets import Dataset

from helpers.common import UserError
from helpers.data.check import check_pairs
from helpers.data.findings import Report
from helpers.data.render import pair_lengths
from helpers.data.report import load_report
from helpers.model import Tokenizer
from helpers.model.fingerprint import adapter_settings, config_hash
from helpers.model.memory import BATCH_SETTINGS, ESTIMATE_MARGIN, BatchPlan, estimate_for, free_memory, plan_for
from helpers.model.policy import Policy
from helpers.model.profiles import current_profile
from helpers.run import folder as runs
from helpers.session import quiet_progress
from helpers.train import say
from helpers.train.processes import check_alike, once, processes, share_step
from helpers.train.resume import differences, step_of
from helpers.train.settings import (
    DPOConfig,
    check_optimizer,
    passes_ahead,
    run_config,
    too_little_or_far,
    what_will_happen,
)

TOKENS = "tokens"  # in the folder of a run whose template writes the date: the ids that it began with


class CheckedPairs(NamedTuple):
    """Pairs that were checked for a tokenizer: the reports of both sets, and the rule for long prompts."""

    train: Report
    test: Report
    rule: dict[str, Any]

    sets = property(lambda self: {"train": self.train, "test": self.test})

    def take_from(self, folder: Path) -> None:
        """Take the tokens that the run in `folder` began with, if its template writes the date."""
        for name, report in self.sets.items() if (folder / TOKENS).is_dir() else ():
            # In memory: the files may be removed while they are used.
            report.take(Dataset.load_from_disk(str(folder / TOKENS / name), keep_in_memory=True))


def check_both(train: Dataset, test: Dataset, tokenizer: Tokenizer, max_length: int, **rule: Any) -> CheckedPairs:
    """Check both sets by `check_pairs` with its `rule`; UserError for errors, a line for long prompts."""
    for name, given in (("train", train), ("test", test)):
        if not isinstance(given, Dataset):
            raise UserError(say("no_pairs", name=name, kind=type(given).__name__))
    pairs = CheckedPairs(
        check_pairs(train, tokenizer, max_length, test=test, **rule),
        check_pairs(test, tokenizer, max_length, **rule),
        rule,
    )
    for name, report in (("training", pairs.train), ("held-out", pairs.test)):
        report.raise_for_errors()
        if any(report.prompts.values()):
            print(say("long_prompts", name=name, checked=report.checked, **report.prompts, **rule))
    return pairs


def hash_without_date(train: Report, test: Report, tokenizer: Tokenizer) -> str:
    """Of the pairs in `train` and `test` and the template of `tokenizer`, if that writes the date; else nothing.

    The tokens of such pairs are others tomorrow.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return ""
    rows = [tokenizer.chat_template, *train.pairs, *test.pairs]
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
    info: runs.RunInfo = dataclasses.field(init=False)  # as it will be in run.json
    plan: BatchPlan | None = None  # by free memory; None if the settings or an earlier run say how a step is made

    # By `values` as they are now: of this process's trainer; as in one process, so that any number can go on.
    config = property(lambda self: self._config(share_step(self.values)))
    described = property(lambda self: runs.describe_config(self._config(self.values)))
    tokens = property(lambda self: self.folder / TOKENS)

    def _config(self, share: dict[str, Any]) -> DPOConfig:
        return run_config(self.folder, len(self.pairs.train.pairs), self.values, share)

    def __post_init__(self) -> None:
        train, test = self.pairs.train, self.pairs.test
        loaded, number = [load_report(report.pairs) for report in (train, test)], processes().num_processes
        share_step(self.values)
        findings, reading = {one.code: one.count for one in train.findings}, loaded[0].reading if loaded[0] else []
        bundled = all(one and one.bundled for one in loaded)
        given = hash_without_date(train, test, self.policy.tokenizer)
        data = runs.DataInfo(train.hash, test.hash, findings, train.prompts, bundled, reading, given, train.longest)
        self.info = runs.RunInfo(
            model=self.policy.name,
            profile=current_profile().name,
            config=self.described,
            train_pairs=len(train.pairs),
            test_pairs=len(test.pairs),
            data=data,
            base=self.policy.base,
            base_config=config_hash(self.policy.model),
            start=self.policy.adapter,
            adapter=adapter_settings(self.policy.model),
            reference=runs.POLICY_AT_START if self.reference is None else self.reference.as_reference,
            versions=runs.versions(),
            machine=runs.machine() if number == 1 else f"{number} x {runs.machine()}",
            status=runs.Status.RUNNING,
            template=self.policy.options,
            prompts_rule=self.pairs.rule,
        )
        check_optimizer(self.config, self.policy.model)
        batch = self.config.per_device_train_batch_size
        if number == 1 and self.config.dataloader_drop_last and len(train.pairs) < batch:  # several drop nothing
            raise UserError(say("none_left", pairs=len(train.pairs), batch=batch))
        info, hashes = self.info, (train.hash, test.hash)
        check_alike(model=info.base, adapter=info.start, settings=info.config, pairs=hashes)

    def earlier(self, replace: bool) -> runs.RunInfo | None:
        """The same run as it was left in the folder; another is put aside if `replace`, else UserError is raised."""
        free = min(gather_object([free_memory(self.policy.device)]))  # of the fullest card
        found = once(lambda: (self._earlier(replace, free), self.values, self.info, self.plan))
        before, self.values, self.info, self.plan = found
        if before is not None:
            self.pairs.take_from(self.folder)
        return before

    def _earlier(self, replace: bool, free: float) -> runs.RunInfo | None:
        before = None
        try:
            before = runs.read_info(self.folder)
        except UserError:  # run.json can't be read, or lacks something
            if not replace:
                raise
            runs.set_aside(self.folder)
        checkpoints = any(self.folder.glob("checkpoints/checkpoint-*"))
        others = [name for name in runs.FILES if (self.folder / name).exists()] + ["checkpoints"] * checkpoints
        if before is None and others:
            if not replace:
                raise UserError(say("no_run", folder=self.folder, files=", ".join(others)))
            runs.set_aside(self.folder)
        finished = before and before.end
        dated = bool(before and before.data.given and before.data.given == self.info.data.given)
        if before and dated and (finished or self.tokens.is_dir()):
            self.info.data = before.data
        self._choose_step(before if finished or checkpoints else None, free)
        changed = differences(before, self.info) if before else []
        if changed and (finished or checkpoints) and not replace:
            raise UserError(say("other_run", folder=self.folder, changed="; ".join(changed[:3])))
        if changed:
            runs.set_aside(self.folder)
        return None if changed else before

    def _need(self, **change: Any) -> float:
        """GB besides the loaded model, by the estimate, with a `change` of the settings."""
        values = share_step(self.values | change)
        return estimate_for(self.policy.model, self.pairs.train.ids, values).training / 1e9

    def _choose_step(self, before: runs.RunInfo | None, free: float) -> None:
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

    @property
    def scored_at_once(self) -> int:
        """Pairs in a batch of a pass without gradients: `precompute_ref_batch_size`, else `per_device_eval_batch_size`.

        On a GPU, if neither is given, more than are trained on at once: nothing is kept for a backward pass, and few
        would leave the GPU waiting.
        """
        given = [self.settings.get(name) for name in ("precompute_ref_batch_size", "per_device_eval_batch_size")]
        if any(given) or self.policy.device.type == "cpu":
            return given[0] or self.values["per_device_eval_batch_size"]
        trained = share_step(self.values)["per_device_train_batch_size"]
        return trained * (2 if self.values["gradient_checkpointing"] else 4)

    def begin(self) -> None:
        """Say how a step is made, write run.json; UserError if training needs far more memory than is free."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (*runs.FILES, TOKENS):
            for part in self.folder.glob(f".{name}.????????"):  # of a call that was killed while it wrote
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        self._keep_tokens()
        need, free, plan = self.info.memory_gb["needed"], self.info.memory_gb["free"], self.plan
        if plan is not None:
            words = {"s": "s" * (plan.pairs > 1), "checkpointing": "on" if plan.checkpointing else "off"}
            print(say("plan", plan=plan, needed=plan.bytes / 1e9, free=free, **words))
        if said := too_little_or_far(self.values, len(self.pairs.train.pairs), self.policy.model.active_peft_config):
            print(said)
        if need >= free:
            text = f"Training needs about {need:.1f} GB besides the loaded model, and {free:.1f} GB are free."
            if need > ESTIMATE_MARGIN * free:
                self.write(runs.Status.OUT_OF_MEMORY)
                raise UserError(f"{text}\n{self.savings()}")
            print(f"{text} It may not fit.\n{self.savings()}")
        self.write(runs.Status.RUNNING)

    def ahead(self, done: int, seconds: float | None) -> str:
        """What will happen after `done` steps, in one line; `seconds`: the reference's for a pair, if known."""
        train, test = (len(report.pairs) for report in (self.pairs.train, self.pairs.test))
        passes = passes_ahead(self.values, train, test, done, self.policy.device.type == "cpu")
        return what_will_happen(self.values, train, done, None if seconds is None else passes * seconds)

    def _keep_tokens(self) -> None:
        if not self.info.data.given or (self.tokens.is_dir() and (self.folder / "run.json").exists()):
            return
        part = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{TOKENS}."))
        for name, report in self.pairs.sets.items():
            with quiet_progress(len(report.ids)):
                report.ids.save_to_disk(part / name)
        shutil.rmtree(self.tokens, ignore_errors=True)  # of a call that was killed before it wrote run.json
        part.rename(self.tokens)

    def begin_again(self) -> None:
        """Write what `begin` wrote, if the folder was removed while training."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_tokens()
        if not (self.folder / "run.json").exists():
            self.write(runs.Status.RUNNING)

    def write(self, status: runs.Status, steps: int | None = None) -> None:
        """Write run.json with this `status`, and after so many `steps`."""
        runs.write_info(self.folder, dataclasses.replace(self.info, status=status, steps=steps))

    def savings(self) -> str:
        """What to change if memory is short, each with what it saves by the estimate."""
        size, pieces, checkpointing = (self.values[name] for name in BATCH_SETTINGS)
        lengths = pair_lengths(self.pairs.train.ids)
        half = min(int(lengths.max()), self.values["max_length"]) // 2
        halved = {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": pieces * 2}
        changes: list[tuple[str, dict]] = [("slower", {"gradient_checkpointing": True})] * (not checkpointing)
        changes += [("the same effective batch", halved)] * (size > 1)
        changes += [(f"cuts {int((lengths > half).sum())} of {len(lengths)} pairs", {"max_length": half})]
        text = "What to change in the call, and what it saves:"
        for note, change in changes:
            call = ", ".join(f"{name}={value}" for name, value in change.items())
            text += f"\n- {call} ({note}): {self._need() - self._need(**change):.1f} GB"
        return text

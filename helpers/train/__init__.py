"""Training: settings, trainer, resume, `train_dpo`; a start by SFT; a sweep over beta."""

from pathlib import Path
from typing import Any

import yaml

_TEXTS = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))


def say(text: str, **values: Any) -> str:
    """The `text` of that name in texts.yaml, with `values` in its places."""
    return _TEXTS[text].format(**values)

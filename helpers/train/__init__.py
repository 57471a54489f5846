"""Training: settings, trainer, resume, `train_dpo`; a start by SFT; a sweep over beta; sampled pairs."""

from typing import Any

from helpers.common import documents

# What train_dpo does with each setting of DPOConfig, where it starts, which values it takes, and what it says.
TABLE: dict[str, Any] = documents(__file__, "settings.yaml")[0]


def say(text: str, **values: Any) -> str:
    """The `text` of that name in the table, with `values` in its places."""
    return TABLE["texts"][text].format(**values)

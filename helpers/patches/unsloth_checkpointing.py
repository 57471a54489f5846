"""Gradient checkpointing on a GPU as the config says, and not as the adapter was made.

Unsloth notes at `get_peft_model` whether to checkpoint, in `model._unsloth_gradient_checkpointing`, and its trainers
follow that note whatever the config says. On a CPU nothing reads it.
"""

from pathlib import Path

import unsloth
from peft import PeftModel

from helpers.patches import expect, works


def self_test() -> None:
    """Unsloth's models note the name and its trainers read it. By their source: on a CPU importing it has effects."""
    for name in ("llama.py", "rl.py"):
        source = (Path(unsloth.__file__).parent / "models" / name).read_text(encoding="utf-8")
        expect("model._unsloth_gradient_checkpointing" in source, f"{name} of Unsloth knows no such note")


def set_checkpointing(model: PeftModel, on: bool) -> None:
    """Have Unsloth's trainer checkpoint if `on`. Nothing changes on a CPU, or if the `model` has no other note."""
    made = getattr(model, "_unsloth_gradient_checkpointing", None)
    other = model.device.type != "cpu" and made is not None and bool(made) != on
    if other and works("unsloth_checkpointing"):
        model._unsloth_gradient_checkpointing = on  # noqa: SLF001  (the patch)

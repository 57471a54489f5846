"""Profiles: all that differs between a GPU and a CPU."""

from dataclasses import dataclass

import torch

from helpers.common import UserError, setting

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Profile:
    """What a kind of machine runs: model names, whether weights are 4-bit, and lengths in tokens."""

    name: str
    model: str
    thinking_model: str
    load_in_4bit: bool
    max_length: int
    thinking_max_length: int


PROFILES = {
    "gpu": Profile(
        name="gpu",
        model="unsloth/Qwen3-4B-unsloth-bnb-4bit",
        thinking_model="unsloth/Qwen3-4B-Thinking-2507-unsloth-bnb-4bit",
        load_in_4bit=True,
        max_length=512,
        thinking_max_length=1024,
    ),
    # 16-bit: 4-bit weights work on a CPU too, but are slower there.
    "cpu": Profile("cpu", EMBEDDED, EMBEDDED, load_in_4bit=False, max_length=512, thinking_max_length=512),
}


def current_profile() -> Profile:
    """The profile of this machine: `DPO_PROFILE` if it is set, else `gpu` if an accelerator is found.

    Raises UserError for a profile that does not exist, or for `gpu` if there is none.
    """
    has_gpu = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    name = setting("DPO_PROFILE", "gpu" if has_gpu else "cpu")
    if name not in PROFILES:
        raise UserError(
            f"DPO_PROFILE is {name!r}, which is not a profile. Use one of {', '.join(PROFILES)} in .env, "
            "or leave it out to have one chosen from the hardware."
        )
    if name == "gpu" and not has_gpu:
        raise UserError(
            "DPO_PROFILE is 'gpu', but torch finds no GPU. Check the driver (`nvidia-smi`), or use DPO_PROFILE=cpu."
        )
    return PROFILES[name]

"""Profiles: all that differs between a GPU and a CPU."""

from dataclasses import dataclass

import torch

from helpers.common import setting
from helpers.model import refusal

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


QWEN3 = ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "unsloth/Qwen3-4B-Thinking-2507-unsloth-bnb-4bit")
PROFILES = {
    "gpu": Profile("gpu", *QWEN3, load_in_4bit=True, max_length=512, thinking_max_length=1024),
    # 16-bit: 4-bit weights work on a CPU too, but are slower there.
    "cpu": Profile("cpu", EMBEDDED, EMBEDDED, load_in_4bit=False, max_length=512, thinking_max_length=512),
}


def current_profile() -> Profile:
    """The profile of this machine: `DPO_PROFILE` if it is set, else `gpu` if an accelerator is found.

    Raises UserError for a profile that does not exist, or for `gpu` if there is none.
    """
    has_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    name = setting("DPO_PROFILE", "gpu" if has_gpu else "cpu")
    if name not in PROFILES:
        raise refusal("no profile", name=name, profiles=", ".join(PROFILES))
    if name == "gpu" and not has_gpu:
        raise refusal("no GPU")
    return PROFILES[name]

"""On a GPU: bitsandbytes' 8-bit optimizers without a wait for the GPU after each weight.

With LoRA some 500 weights are updated, one kernel each, and after each the optimizer waits (`sync_gpu`). Without the
waits the CPU hands the kernels over while the GPU still computes gradients. The name is put back after each step.
Paged optimizers need a wait at the end of a step, and are left as they are.
"""

import functools
import types
from typing import Any

import torch
import trl
from bitsandbytes.optim import AdamW8bit, optimizer

from helpers.patches import expect, works


def _step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
    wait, optimizer.sync_gpu = optimizer.sync_gpu, lambda weight: None
    try:
        return type(self).step(self, *args, **kwargs)
    finally:
        optimizer.sync_gpu = wait


def self_test() -> None:
    """A step calls `sync_gpu` by its name in the module, once for each weight; ours does not, and updates alike."""
    weights, waits, wait = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)], [], optimizer.sync_gpu
    optimizer.sync_gpu = waits.append
    try:
        for weight, step in zip(weights, (AdamW8bit.step, _step), strict=True):
            weight.grad = torch.ones(2)
            step(AdamW8bit([weight], lr=0.1))
    finally:
        optimizer.sync_gpu = wait
    expect(len(waits) == 1 and waits[0] is weights[0], "bitsandbytes' optimizer waits in another way")
    expect(weights[0].tolist() == weights[1].tolist() != [1.0, 1.0], "a step without waits gives other weights")


def update_without_waits(trainer: trl.DPOTrainer) -> None:
    """Have the optimizer that `trainer` will make hand over all of its kernels without a wait between them."""
    create = trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = create(*args, **kwargs)
        if isinstance(made, optimizer.Optimizer8bit) and not made.is_paged and works("optimizer_waits"):
            made.step = types.MethodType(_step, made)
        return made

    trainer.create_optimizer = create_optimizer

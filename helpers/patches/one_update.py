"""On a GPU: bitsandbytes' 8-bit optimizers update LoRA's weights by one kernel, and wait for nothing.

LoRA has some 500 weights. bitsandbytes updates each by a kernel of its own and then waits for the GPU (`sync_gpu`).
Here their states lie one after the other, and `update_step` gets all weights as one. What it scales are blocks of 256
numbers, which stay the same, and so do weights and states, bit by bit. Paged optimizers need their waits, and are left
as they are.
"""

import functools
import types
from typing import Any

import torch
import trl
from bitsandbytes.optim import AdamW8bit, optimizer

from helpers.patches import expect, works

_BLOCK = 256  # numbers with a scale of their own
_PARTS = ("state1", "state2", "absmax1", "absmax2")  # of a weight's state: what lies one after the other


def _each_by_itself(self: optimizer.Optimizer8bit) -> None:
    """bitsandbytes' own step, without its waits; the name is put back."""
    wait, optimizer.sync_gpu = optimizer.sync_gpu, lambda weight: None
    try:
        type(self).step(self)
    finally:
        optimizer.sync_gpu = wait


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state for all of `states`, whose own are parts of it from here on."""
    whole = dict(states[0])
    for name in _PARTS:
        own = [state[name] for state in states]
        whole[name] = torch.cat([one.flatten() for one in own])
        for state, one, part in zip(states, own, whole[name].split([one.numel() for one in own]), strict=True):
            state[name] = part.view_as(one)
    return whole


def _together(self: optimizer.Optimizer8bit) -> tuple[int, dict[str, Any]] | None:
    """The group of weights with its index, if there is one and all of its weights can be updated as one."""
    groups = [(index, group) for index, group in enumerate(self.param_groups) if group["params"]]
    weights = groups[0][1]["params"]
    states = [self.state.get(weight, {}) for weight in weights]  # none before the first step
    fit = len(groups) == len({state.get("step") for state in states}) == 1
    fit &= not self.mng.pid2config and not self.mng.index2config  # settings of one weight alone
    fit &= len({(weight.dtype, weight.device) for weight in weights}) == 1
    for weight, state in zip(weights, states, strict=True):
        fit &= weight.grad is not None and weight.numel() % _BLOCK == 0
        # Small weights have states without scales; some optimizers have one moment, or two in one state.
        fit &= "absmax2" in state and state["state1"].shape == weight.shape
    return groups[0] if fit else None


@torch.no_grad()
def _step(self: optimizer.Optimizer8bit, closure: None = None) -> None:
    if (found := _together(self)) is None:
        _each_by_itself(self)
        return
    index, group = found
    weights, states = group["params"], [self.state[weight] for weight in group["params"]]
    whole, parts = vars(self).get("whole_state", ({}, ()))
    if [id(state["state1"]) for state in states] != [*map(id, parts)]:  # the first time, or a checkpoint was loaded
        whole = _joined(states)
        self.whole_state = whole, [state["state1"] for state in states]
    every = torch.nn.Parameter(torch.cat([weight.flatten() for weight in weights]))
    every.grad = torch.cat([weight.grad.flatten() for weight in weights])
    self.state[every] = whole
    try:
        self.update_step(group, every, index, 0)
    finally:
        del self.state[every]
    new = zip(weights, every.detach().split([weight.numel() for weight in weights]), strict=True)
    torch._foreach_copy_(weights, [part.view_as(weight) for weight, part in new])
    for state in states:
        state["step"] = whole["step"]


def self_test() -> None:
    """Three steps give the weights and states that bitsandbytes gives."""
    found = []
    for step in (AdamW8bit.step, _step):
        torch.random.default_generator.manual_seed(0)
        weights = [torch.nn.Parameter(torch.zeros(size, device="cpu")) for size in (8192, 4096)]
        made = AdamW8bit(weights, lr=0.1)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, device="cpu")
            step(made)
        states = [made.state[weight][name].float() for weight in weights for name in _PARTS]
        found.append(torch.cat([*states, *(weight.detach() for weight in weights)]))
    expect("whole_state" in vars(made), "bitsandbytes keeps its states in another way")
    expect(torch.equal(*found), "weights that are updated together are others")
    expect(all(weight.abs().min() > 0 for weight in weights), "a step does not change all weights")


def update_at_once(trainer: trl.DPOTrainer) -> None:
    """Have the optimizer that `trainer` will make update all of its weights together, without a wait."""
    create = trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = create(*args, **kwargs)
        if isinstance(made, optimizer.Optimizer8bit) and not made.is_paged and works("one_update"):
            made.step = types.MethodType(_step, made)
        return made

    trainer.create_optimizer = create_optimizer

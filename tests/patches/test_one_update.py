"""All weights updated together are those that bitsandbytes updates one by one, whatever it is given."""

import copy
import types

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, AdEMAMix8bit, Lion8bit

from helpers.patches.one_update import _step  # what a trainer's optimizer gets as its `step`


def optimizer(sizes, together, short=(), kind=AdamW8bit, **options):
    """Of weights of these sizes; those at the places `short` are in 16 bits."""
    torch.manual_seed(0)
    drawn = [torch.randn(size) for size in sizes]
    weights = [torch.nn.Parameter(one.half() if place in short else one) for place, one in enumerate(drawn)]
    made = kind(weights, lr=0.01, **options)
    if together:
        made.step = types.MethodType(_step, made)
    return made


def step(made, seed, without=()):
    torch.manual_seed(seed)
    for place, weight in enumerate(made.param_groups[0]["params"]):
        gradient = torch.randn(weight.shape).to(weight.dtype)
        weight.grad = None if place in without else gradient
    made.step()


def same(one, other):
    """Weights and states, bit by bit."""
    for weight, twin in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(weight, twin)
        state, expected = one.state[weight], other.state[twin]
        assert state.keys() == expected.keys() and len(state) > 2 and state["step"] == expected["step"]
        for name, values in expected.items():
            assert torch.equal(torch.as_tensor(values), torch.as_tensor(state[name])), name
    assert len(one.state) == len(other.state)


SIZES = [(16, 320), (2048, 16), (16, 256)]
CASES = {  # sizes, options, places without a gradient in the third step, whether there are steps of all together
    "as LoRA's": (SIZES, {}, (), True),
    "a small one in 32 bits": ([*SIZES, (16,)], {}, (), False),
    "no whole blocks": ([*SIZES, (16, 257)], {}, (), False),
    "one without a gradient": (SIZES, {}, (1,), True),
    "16 bits and 32": (SIZES, {"short": [1]}, (), False),
    "weight decay": (SIZES, {"weight_decay": 0.1, "betas": (0.8, 0.95)}, (), True),
    "one moment": (SIZES, {"kind": Lion8bit}, (), False),
    "three moments, two of them in one state": (SIZES, {"kind": AdEMAMix8bit}, (), False),
}


@pytest.mark.parametrize("sizes, options, without, together", CASES.values(), ids=CASES)
def test_the_same_weights_and_states(sizes, options, without, together):
    ours, expected = (optimizer(sizes, changed, **options) for changed in (True, False))
    for seed in range(5):
        for made in (ours, expected):
            made.param_groups[0]["lr"] = 0.01 / (seed + 1)  # as a schedule sets it
            step(made, seed, without if seed == 2 else ())
    same(ours, expected)
    assert ("whole_state" in vars(ours)) == together


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_a_checkpoint_of_one_is_read_by_the_other(before, after):
    first, expected = (optimizer(SIZES, together) for together in (before, False))
    for seed in range(3):
        step(first, seed)
        step(expected, seed)
    second = optimizer(SIZES, after)
    step(second, 7)  # states and weights of its own, which the checkpoint replaces
    step(second, 8)
    with torch.no_grad():
        for weight, own in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
            weight.copy_(own)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 6):
        step(second, seed)
        step(expected, seed)
    same(second, expected)


def test_a_saved_state_is_no_larger(tmp_path):
    for together in (True, False):
        made = optimizer(SIZES, together)
        for seed in range(3):
            step(made, seed)
        torch.save(made.state_dict(), tmp_path / str(together))
    ours, theirs = ((tmp_path / str(together)).stat().st_size for together in (True, False))
    assert ours < 1.1 * theirs

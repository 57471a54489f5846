"""LoRA's weights cast once a step: the same loss and gradients as a cast at each use."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.patches.cast_once import cast_weights_once


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, inputs):
        return self.second(self.first(inputs).tanh())


@pytest.fixture
def policy():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["first", "second", "unused"], init_lora_weights=False)
    return get_peft_model(Layers(), config)


def two_pieces(policy, step) -> tuple[list[float], dict[str, torch.Tensor]]:
    policy.zero_grad()
    losses = [step().item(), step().item()]
    return losses, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_weights_cast_once_give_the_same_loss_and_gradients(policy):
    weights = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    inputs = torch.randn(5, 16)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = policy(inputs).square().mean()
        loss.backward()
        return loss.detach()

    losses, gradients = two_pieces(policy, step)
    assert len(gradients) == 4 < len(weights)
    trainer = SimpleNamespace(model=policy, training_step=step)
    cast_weights_once(trainer)
    for _ in range(2):  # the second time its copies hold gradients already
        once, gradients_once = two_pieces(policy, trainer.training_step)
        assert once == losses and gradients.keys() == gradients_once.keys()
        for name, gradient in gradients.items():
            assert gradients_once[name].dtype == torch.float32 and torch.equal(gradient, gradients_once[name]), name
    assert all(dict(policy.named_parameters())[name] is weight for name, weight in weights.items())
    with torch.no_grad():
        weights["base_model.model.first.lora_B.default.weight"].mul_(2)
    assert two_pieces(policy, trainer.training_step)[0] != losses  # no old copy is used


def test_weights_are_back_after_an_error_and_half_a_gradient_is_forgotten(policy):
    weights, inputs, fails = dict(policy.named_parameters()), torch.randn(5, 16), [False]

    def step() -> torch.Tensor:
        loss = policy(inputs).square().mean()
        loss.backward()
        if fails[0]:
            raise RuntimeError("out of memory")
        return loss.detach()

    trainer = SimpleNamespace(model=policy, training_step=step)
    cast_weights_once(trainer)
    _, gradients = two_pieces(policy, trainer.training_step)
    fails[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.training_step()
    assert all(weight is weights[name] for name, weight in policy.named_parameters())
    fails[0] = False
    _, again = two_pieces(policy, trainer.training_step)
    assert all(torch.equal(gradient, again[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("kind", ["other weights are trained", "DoRA", "weights in 16 bits"])
def test_other_trainers_are_left_as_they_are(policy, kind):
    if kind == "weights in 16 bits":
        policy.bfloat16()
    elif kind == "DoRA":  # its magnitudes want 32 bits
        policy = get_peft_model(Layers(), LoraConfig(r=4, target_modules=["first"], use_dora=True))
    else:
        policy.base_model.model.first.base_layer.weight.requires_grad_(True)
    step = object()
    trainer = SimpleNamespace(model=policy, training_step=step)
    cast_weights_once(trainer)
    assert trainer.training_step is step

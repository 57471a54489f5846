"""LoRA's weights cast to bf16 once a batch, all together, and not wherever Unsloth's kernels use them.

The kernels cast a weight in the forward pass, where that is repeated for checkpointing, in the backward pass, and its
gradient back. That is a fifth of a step's kernels, each of which the CPU hands over. The copies are written straight
into `module._parameters`; torch's `_foreach_` functions copy and add many small tensors at once.
"""

import functools
from typing import Any

import torch
import trl

from helpers.patches import expect, works


def self_test() -> None:
    """A module uses what is put into `_parameters`, and the functions for many tensors do what their names say."""
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16, device="cpu")
    short = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    torch._foreach_copy_([short.detach()], [torch.full((1, 1), 2.0)])
    layer._parameters["weight"] = short  # noqa: SLF001  (what is tested)
    result = layer(torch.ones(1, 1, dtype=torch.bfloat16))
    result.sum().backward()
    total = torch.ones(1, 1)
    torch._foreach_add_([total], [short.grad])
    expect(result.item() == 2 and layer.weight is short, "a module does not use what is put into _parameters")
    expect(total.item() == 2, "torch._foreach_add_ does not add")


def _take_gradients(weights: list[torch.Tensor], short: list[torch.nn.Parameter]) -> None:
    """Add the gradients of the copies `short` to those of `weights`, in 32 bits."""
    used = [(weight, copy.grad) for weight, copy in zip(weights, short, strict=True) if copy.grad is not None]
    first, later = ([pair for pair in used if (pair[0].grad is None) == new] for new in (True, False))
    for weight, _ in first:
        weight.grad = torch.empty_like(weight)
    for add, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, later)):
        if pairs:
            add([weight.grad for weight, _ in pairs], [gradient for _, gradient in pairs])


def cast_weights_once(trainer: trl.DPOTrainer) -> None:
    """Have the adapter's weights cast to bf16 once for each batch; the results stay the same.

    The optimizer, clipping and checkpoints see the 32-bit weights and their gradients, as before. A `trainer` that
    trains anything besides LoRA's two matrices, or has them in 16 bits already, is left as it is.
    """
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    matrices = [
        (name, part) for name, part in trainer.model.named_modules() if ".lora_A." in name or ".lora_B." in name
    ]
    modules = [module for name, module in matrices if f"{name}.weight" in trained]
    weights = [module.weight for module in modules]
    plain = len(weights) == len(trained) and all(weight.dtype == torch.float32 for weight in weights)
    if not (plain and works("cast_once")):
        return
    short = [torch.nn.Parameter(weight.detach().bfloat16()) for weight in weights]
    step = trainer.training_step

    def put(parameters: list[torch.nn.Parameter]) -> None:
        for module, parameter in zip(modules, parameters, strict=True):
            module._parameters["weight"] = parameter  # noqa: SLF001  (see above)

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_copy_(short, weights)
        for parameter in short:
            parameter.grad = None
        try:
            put(short)
            loss = step(*args, **kwargs)
        finally:
            put(weights)
        _take_gradients(weights, short)
        return loss

    trainer.training_step = training_step

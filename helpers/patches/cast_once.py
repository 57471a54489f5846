"""Training: settings with their reasons, reference log-probs computed once, and a run folder that resumes.

`train_dpo` is what `03_train` shows step by step: it checks the pairs, takes the reference's log-probs once, trains
with TRL's DPOTrainer, and leaves a run folder. Called again after an interruption it goes on where it stopped.
"""

import functools
from typing import Any

import torch
import trl


def cast_weights_once(trainer: trl.DPOTrainer) -> None:
    """Have the adapter's weights cast to bf16 once for each batch, all together; the results stay the same.

    Unsloth's kernels cast a weight wherever they use it: in the forward pass, where that is repeated for checkpointing,
    in the backward pass, and its gradient back. That is a fifth of a step's kernels, each of which the CPU hands over.
    The optimizer, clipping and checkpoints see the 32-bit weights and their gradients, as before.

    Args:
        trainer: its `training_step` is wrapped. One that trains anything beside LoRA's two matrices, or has them in
            16 bits already, is left as it is.
    """
    model = trainer.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [(name, module) for name, module in model.named_modules() if ".lora_A." in name or ".lora_B." in name]
    modules = [module for name, module in matrices if f"{name}.weight" in trained]
    weights = [module.weight for module in modules]
    if len(weights) < len(trained) or any(weight.dtype != torch.float32 for weight in weights):
        return
    short = [torch.nn.Parameter(weight.detach().bfloat16()) for weight in weights]
    step = trainer.training_step

    def put(parameters: list[torch.nn.Parameter]) -> None:
        for module, parameter in zip(modules, parameters, strict=True):
            module._parameters["weight"] = parameter

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
        first, further = [], []  # batches of a step
        for weight, parameter in zip(weights, short, strict=True):
            if parameter.grad is None:
                continue
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
                first.append((weight.grad, parameter.grad))
            else:
                further.append((weight.grad, parameter.grad))
        for add, pairs in ((torch._foreach_copy_, first), (torch._foreach_add_, further)):
            if pairs:
                add(*map(list, zip(*pairs, strict=True)))
        return loss

    trainer.training_step = training_step

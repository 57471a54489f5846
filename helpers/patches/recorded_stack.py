"""On a GPU: the kernels of the decoder layers, forward and backward, recorded for each width of a batch and replayed.

A step hands some 6,000 kernels over one by one, and the GPU often waits for the next one. A CUDA graph starts them all
at once: the same kernels, with the same results. Recording is torch's public CUDAGraph. What is private: Unsloth's
layers look into the positions for sequences, which waits for the GPU and may not be recorded, and only a private name
shows that checkpoints go to the machine's memory. `cast_once` uses torch's `_foreach_copy_` too.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from helpers.patches import expect, shared_prompt, works
from helpers.patches.fused_lm_head import own_forward
from helpers.patches.prompt_segments import Keys, take_segments

_MOST = 12  # recorded widths, each of which keeps its result; other widths are not recorded


class _Recording:
    """The kernels of `run` and of its backward pass for `inputs` of one shape.

    `run(*inputs)` gives one tensor. The backward pass leaves the gradients of `weights` in `gradients`, which all
    recordings share; their `grad` must be None before.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        weights: list[Tensor],
        inputs: list[Tensor],
        pool: Any,
        gradients: list[Tensor],
    ) -> None:
        self.inputs, self.weights, self.gradients = [one.clone() for one in inputs], weights, gradients
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how = {"pool": pool, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(self.forward, **how):
                result = run(*self.inputs)
            self.gradient = torch.empty_like(result)
            with torch.cuda.graph(self.backward, **how):
                result.backward(self.gradient)
                torch._foreach_copy_(gradients, [weight.grad for weight in weights])
        finally:
            for weight in weights:
                weight.grad = None
        self.result = result.detach()


class _Replay(torch.autograd.Function):
    """A recording as an operation; its input that needs a gradient is there for autograd alone."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, _: Tensor, *inputs: Tensor) -> Tensor:
        ctx.recording = recording
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.forward.replay()
        return recording.result.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        recording: _Recording = ctx.recording
        recording.gradient.copy_(gradient)
        recording.backward.replay()
        for weight, found in zip(recording.weights, recording.gradients, strict=True):
            weight.grad = found
        return (None,) * (2 + len(recording.inputs))


def self_test() -> None:
    """A replay gives the results and gradients of what was recorded, with inputs and weights as they are then.

    Without a GPU only the names are looked up.
    """
    expect(callable(torch.cuda.graph_pool_handle), "torch has no pool for CUDA graphs")
    if not torch.cuda.is_available():
        return
    take_segments()
    weight, start = torch.ones(2, 2, device="cuda", requires_grad=True), torch.ones((), requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return (x @ weight).square()

    x = torch.ones(1, 2, device="cuda")
    run(x).sum().backward()  # loads the kernels
    weight.grad = None
    recording = _Recording(run, [weight], [x], torch.cuda.graph_pool_handle(), [torch.empty_like(weight)])
    with torch.no_grad():
        weight.mul_(2)
    result = _Replay.apply(recording, start, 3 * x)
    result.sum().backward()
    expect(result.tolist() == [[144.0, 144.0]], "a replay gives another result")
    expect(weight.grad is not None and weight.grad.tolist() == [[72.0] * 2] * 2, "a replay gives another gradient")


def _rounded(size: int) -> int:
    """An upper bound that few sizes have: the next power of two."""
    return 1 << (size - 1).bit_length()


class _Stack:
    """The decoder layers of a policy, whose forward is replayed where that is possible."""

    def __init__(self, layers: torch.nn.Module) -> None:
        self.layers, self.plain = layers, layers.forward
        self.recordings: dict[tuple[int, ...], _Recording] = {}
        self.weights: list[Tensor] = []  # the same in each step; to look for them takes longer than to start a graph
        self.gradients: list[Tensor] = []
        self.on = True
        self.pool, self.start = torch.cuda.graph_pool_handle(), torch.zeros((), requires_grad=True)

    def forward(self, *args: Any, **given: Any) -> Any:
        keys = given.get("prefix_seg_info")
        able = self.on and isinstance(keys, Keys) and not args and self.layers.training and torch.is_grad_enabled()
        if not able or any(weight.grad is not None for weight in self.weights):
            return self.plain(*args, **given)
        if not self.weights:  # the first batch loads and chooses kernels, which may not be recorded
            self.weights = [weight for weight in self.layers.parameters() if weight.requires_grad]
            self.gradients = [torch.empty_like(weight) for weight in self.weights]
            return self.plain(*args, **given)
        longest = _rounded(keys.longest_q), _rounded(keys.longest_k)
        inputs = [given["input_ids"], given["position_ids"], *keys[:4]]
        shape = (*longest, *(one.numel() for one in inputs))
        full = len(self.recordings) == _MOST
        if shape not in self.recordings and (full or not self._record(shape, inputs, given)):
            return self.plain(*args, **given)
        result = _Replay.apply(self.recordings[shape], self.start, *inputs)
        return BaseModelOutputWithPast(last_hidden_state=result)

    def _record(self, shape: tuple, inputs: list[Tensor], given: dict[str, Any]) -> bool:
        others = {name: one for name, one in given.items() if name not in ("input_ids", "position_ids")}

        def run(ids: Tensor, positions: Tensor, *keys: Tensor) -> Tensor:
            others["prefix_seg_info"] = Keys(*keys, *shape[:2])
            # A cast that autocast keeps would belong to this recording alone.
            with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
                return self.plain(input_ids=ids, position_ids=positions, **others).last_hidden_state

        torch.cuda.empty_cache()  # recordings have memory of their own
        try:
            self.recordings[shape] = _Recording(run, self.weights, inputs, self.pool, self.gradients)
        except RuntimeError as error:  # torch's errors of CUDA, out of memory too
            first = str(error).strip().partition("\n")[0]
            print(f"The kernels of a step are handed over one by one from here on ({first[:200]}).", flush=True)
            self.on = False
            self.recordings.clear()
            torch.cuda.empty_cache()
        return self.on


def record_stack(trainer: trl.DPOTrainer) -> None:
    """Have `trainer` replay the forward and backward pass of the decoder layers; call it after `cast_weights_once`.

    Only if `shared_prompt.RECORDED`. Left out with dropout, and with checkpointing that keeps things in the machine's
    memory. Where pairs are not packed the forward gets no `Keys`, and nothing is recorded.
    """
    inner = trainer.model.get_base_model()
    drops = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in inner.modules())
    offloads = hasattr(torch.utils.checkpoint, "_old_checkpoint") and trainer.args.gradient_checkpointing
    if not shared_prompt.RECORDED or drops or offloads or not works("recorded_stack"):
        return
    stack, step = _Stack(inner.base_model), trainer.training_step
    # The Trainer's filter would wait for the whole backward pass before the optimizer's kernels are handed over.
    filtered, trainer.args.logging_nan_inf_filter = trainer.args.logging_nan_inf_filter, False

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        with own_forward(stack.layers):
            stack.layers.forward = stack.forward
            loss = step(*args, **kwargs)
        return torch.where(loss.isfinite(), loss, 0) if filtered else loss

    trainer.training_step = training_step

"""One forward over [prompt, chosen, rejected]: the same log-probs as two sequences, with the prompt computed once.

DPOTrainer runs prompt + chosen and prompt + rejected as two rows. Here they are one row, with a mask that hides
chosen from rejected and position ids that start again after the prompt; on a GPU all pairs are in one row, with the
attention of `prompt_segments`. The trainer is not changed: only the model's forward is, and it returns what the
trainer expects. That relies on models that take any mask, and on what TRL's fused LM head takes and returns.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import trl
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from helpers.patches import expect, works
from helpers.patches.prompt_segments import moved, places, segment_keys, take_segments

# Architectures whose attention takes any mask and whose positions are all in position_ids.
SHARED_KINDS = ("llama", "qwen2", "qwen3")
_BATCH = ("input_ids", "attention_mask", "labels")
_FIGURES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of each prediction
# Set to False, a GPU computes each pair as two rows: for benchmarks/gpu.py and tests, which compare.
ON_GPU = True
# Set to False, no kernels are recorded (`recorded_stack`), and rows have more widths; for the same comparisons.
RECORDED = True


@dataclass(eq=False)  # no tuple: what pins and moves a batch leaves it as it is
class Packed:
    """A batch with each prompt once, on the model's device."""

    inputs: dict[str, Any]  # of the model
    given: tuple[torch.Tensor, ...]  # where each prediction is in the rows given: rows, columns
    packed: tuple[torch.Tensor, ...]  # where in the inputs
    rows: dict[str, Any] | None = None  # the rows given, on the CPU, if the loss is to be computed there


def _mask(sizes: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """The additive mask (pairs, 1, tokens, tokens): each of the three parts sees the prompt and itself."""
    parts = [torch.arange(3).repeat_interleave(torch.tensor(row)) for row in sizes]
    part = pad_sequence(parts, batch_first=True, padding_value=3)
    query, key = part[:, None, :, None], part[:, None, None, :]
    seen = ((query == key) | (key == 0)).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def filler(tokens: int) -> int:
    """How many tokens fill a row up: at least one, at most 128 or, if kernels are recorded, a sixteenth of the row.

    For each new width kernels are chosen, loaded and recorded, and the fast ones want a multiple of 8.
    """
    step = max(128, RECORDED * 2 ** (tokens.bit_length() - 5))
    return step - tokens % step


def pack(
    ids: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    inner: PreTrainedModel,
    one_row: bool,
    rows: dict[str, Any] | None = None,
) -> Packed | None:
    """The batch [chosen; rejected] for `inner` with each prompt once, as a row for each pair or all in `one_row`.

    The prompt's last token opens either completion, since it has to predict both first tokens; the last token of a
    completion predicts nothing and is left out. One row is filled up to few different widths, all multiples of 128 (see
    `filler`). More tokens than needed are predicted, so that the LM head's products have few sizes: for a new size
    their kernels are chosen anew, which takes milliseconds. With `rows`, what is found comes back to the CPU (see
    `Packed`). None if the rows are no pairs with equal prompts and something after them.
    """
    if len(ids) % 2:
        return None
    # numpy, which is faster here: a GPU may wait for this.
    pairs, last = len(ids) // 2, (mask.sum(dim=1) - 1).cpu().numpy()
    device, ids, labels = inner.device, ids.cpu().numpy(), labels.cpu().numpy()
    starts = (labels != -100).argmax(axis=1)
    in_prompt = np.arange(ids.shape[1]) < starts[:pairs, None]
    differ = (starts[:pairs] != starts[pairs:]).any() or ((ids[:pairs] != ids[pairs:]) & in_prompt).any()
    if differ or starts.min() <= (1 if one_row else 0):
        return None
    prompts, chosen, rejected = starts[:pairs] - 1, last[:pairs], last[pairs:]
    sizes = np.stack([prompts, chosen - prompts, rejected - prompts], axis=1).tolist()
    # Runs of a row, from a column to another, in the order of what is packed; rejected comes without the prompt.
    begins = np.stack([np.zeros_like(prompts), prompts], axis=1).ravel()
    length = np.stack([chosen, rejected], axis=1).ravel() - begins
    row, column = np.repeat(np.arange(2 * pairs).reshape(2, pairs).T.ravel(), length), places(begins, length)
    following = labels[row, column + 1]
    told, names, rest = following != -100, ("input_ids", "position_ids", "shift_labels"), (0, 0, -100)
    flat = np.stack([ids[row, column], column, following])
    if one_row:
        fill = filler(len(row))
        filled = np.concatenate([flat, np.tile(np.array(rest)[:, None], fill)], axis=1)
        nobody_reads = np.flatnonzero(filled[2] == -100)[: -told.sum() % 128]  # these predictions: see above
        filled[2, nobody_reads] = 0
        inputs: dict[str, Any] = dict(zip(names, moved(filled, device)[:, None], strict=True))
        inputs["prefix_seg_info"] = segment_keys(sizes, fill, device)
        packed = np.zeros_like(row), np.arange(len(row))
    else:
        parts = [torch.from_numpy(one).split([*map(sum, sizes)]) for one in flat]
        padded = zip(names, parts, rest, strict=True)
        inputs = {name: pad_sequence(part, True, value).to(device) for name, part, value in padded}
        inputs["attention_mask"] = _mask(sizes, inner.dtype)
        length = length.reshape(pairs, 2).sum(axis=1)
        packed = np.repeat(np.arange(pairs), length), places(np.zeros_like(length), length)
    given, packed = np.stack([row, column])[:, told], np.stack(packed)[:, told]
    given = moved(given, device if rows is None else torch.device("cpu"))
    return Packed(inputs, tuple(given), tuple(moved(packed, device)), rows)


def _on_gpu(inner: PreTrainedModel) -> bool:
    return inner.device.type == "cuda"


def _share(inner: PreTrainedModel) -> None:
    fused = inner.forward

    @functools.wraps(fused)
    def forward(
        *args: Any, fused_lm_head: bool = False, packed_pairs: Packed | None = None, **kwargs: Any
    ) -> ModelOutput:
        batch: list[Any] = [kwargs.get(name) for name in _BATCH]
        complete = fused_lm_head and all(one is not None for one in batch)
        packed = packed_pairs or (pack(*batch, inner, one_row=_on_gpu(inner)) if complete else None)
        if packed is None:
            if complete:
                kwargs |= {name: one.to(inner.device) for name, one in zip(_BATCH, batch, strict=True)}
            return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        others = {name: value for name, value in kwargs.items() if name not in _BATCH}
        outputs = fused(*args, fused_lm_head=True, **others, **packed.inputs)
        found = {name: getattr(outputs, name) for name in _FIGURES if getattr(outputs, name) is not None}
        # Only the log-probs keep their gradient. One of the entropy, even 0, would make the head compute logits again.
        told = [(one if name == "log_probs" else one.detach())[packed.packed].float() for name, one in found.items()]
        values = torch.stack(told).to(packed.given[0].device)
        for (name, one), own in zip(found.items(), values, strict=True):
            spread = own.new_zeros(len(batch[0]), batch[0].shape[1] - 1)
            setattr(outputs, name, spread.index_put(packed.given, own).to(one.dtype))
        return outputs

    inner.forward = forward


@torch.no_grad()
def self_test() -> None:
    """A tiny model gives the same log-probs packed and as two rows. It stays on the CPU.

    With a GPU, Unsloth's layers take no tensors of a CPU; there the self-test of `prompt_segments` compares.
    """
    from trl.trainer.utils import add_fused_lm_head

    if torch.cuda.is_available():
        return
    torch.random.default_generator.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=32, initializer_range=0.5, attn_implementation="eager", **sizes)
    model = LlamaForCausalLM(config).eval()
    add_fused_lm_head(model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 0, 0], [5, 6, 7, 11, 0, 0], [1, 2, 12, 13, 14, 0]])
    starts, mask = torch.tensor([3, 2, 3, 2]), (ids != 0).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(6) < starts[:, None]), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, "fused_lm_head": True}
    rows = model(**batch).log_probs
    _share(model)
    shared = model(**batch).log_probs
    expect(torch.allclose(rows, shared, atol=1e-3), "a prompt computed once gives other log-probs")


def can_share(inner: PreTrainedModel) -> bool:
    """Whether `share_prompts` changes anything about `inner`, the model inside a PeftModel."""
    kinds = getattr(inner.config, "layer_types", None) or []
    if inner.config.model_type not in SHARED_KINDS or "sliding_attention" in kinds:  # a window is in no mask of ours
        return False
    if _on_gpu(inner):  # the kernel takes 16 bits, on Ampere and later
        able = torch.cuda.get_device_capability(inner.device)[0] >= 8 and inner.dtype != torch.float32
        return ON_GPU and able and works("shared_prompt") and works("prompt_segments")
    return inner.device.type == "cpu" and works("shared_prompt")


def share_prompts(inner: PreTrainedModel) -> None:
    """Make `inner(..., fused_lm_head=True)` compute each pair's prompt once, if its batch is [chosen; rejected].

    `inner` is the model inside a PeftModel, after TRL's `add_fused_lm_head`. Batches that are no pairs with equal
    prompts (a row that truncation left without completion) run as before, and so do architectures that are not in
    `SHARED_KINDS`. A batch on the CPU is laid out there and then moved, so it does not wait for what a GPU has in hand.
    """
    if can_share(inner):
        if _on_gpu(inner):
            take_segments()
        _share(inner)


def lay_out_early(trainer: trl.DPOTrainer) -> None:
    """Have the collator of `trainer` pack each batch, which `forward` then finds in its argument `packed_pairs`.

    To pack a batch that is on the GPU already, the CPU has to wait until the GPU is done with the step before. In the
    collator the batch is still on the CPU. TRL gives the model whatever a batch holds. It would give it to a reference
    too, which does not know `packed_pairs`: so the reference's log-probs have to be in the data.
    """
    inner, collate = trainer.model.get_base_model(), trainer.data_collator
    if not can_share(inner) or trainer.args.dataloader_num_workers:  # other processes do not have the model
        return
    on_cpu = _loss_on_cpu(trainer)

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        if "attention_mask" in batch:  # not if rows come without padding
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)  # as the loss makes them
            given = batch["input_ids"], batch["attention_mask"], labels
            batch["packed_pairs"] = pack(*given, inner, _on_gpu(inner), rows=dict(batch) if on_cpu else None)
        return batch

    trainer.data_collator = collator


def _loss_on_cpu(trainer: trl.DPOTrainer) -> bool:
    """Have `trainer` compute the loss and its figures on the CPU, from the log-probs of a batch that has its `rows`.

    TRL's loss is some hundred small operations and waits for a dozen figures, all between the forward and the backward
    pass. One copy to the CPU takes their place; the gradient takes the same way back. False where that can't be done:
    a loss that puts tensors of its own on the GPU, a scaled one (fp16), several processes.
    """
    args, compute, step = trainer.args, trainer.compute_loss, trainer.training_step
    if args.world_size > 1 or args.fp16 or trainer.ld_alpha is not None or "exo_pair" in trainer.loss_types:
        return False

    @functools.wraps(compute)
    def compute_loss(model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        packed = inputs.get("packed_pairs")
        if packed is not None:
            inputs = packed.rows | {"packed_pairs": packed}
        return compute(model, inputs, *more, **options)

    @functools.wraps(step)
    def training_step(*given: Any, **options: Any) -> torch.Tensor:
        loss = step(*given, **options)
        # A copy to the GPU would wait for the backward pass.
        return loss if loss.device == args.device else torch.full((), loss.item(), device=args.device)

    trainer.compute_loss, trainer.training_step = compute_loss, training_step
    return True

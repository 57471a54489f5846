"""One forward over [prompt, chosen, rejected]: the same log-probs as two sequences, with the prompt computed once.

DPOTrainer runs prompt + chosen and prompt + rejected as two rows. Here they are one row, with a mask that hides
chosen from rejected and position ids that start again after the prompt. The trainer is not changed: only the
model's forward is, and it returns what the trainer expects. That relies on models that take any mask, and on what
TRL's fused LM head takes and returns. On a GPU the row is made by `prompt_segments`.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from helpers.patches import expect, works
from helpers.patches.prompt_segments import segment_keys, segments, take_segments

WITHOUT = "Each pair is computed as two rows, its prompt twice: the same losses, slower."

# Architectures whose attention takes any mask and whose positions are all in position_ids.
_KNOWN = ("llama", "qwen2", "qwen3")
# Set to False, a GPU computes each pair as two rows: for benchmarks/gpu.py and tests, which compare.
ON_GPU = True


class _Packed(NamedTuple):
    """A batch with each prompt once.

    Attributes:
        inputs: for the model: ids, positions, labels, and what its attention needs.
        rows, columns: of each prediction among the rows that were given.
        packed_rows, packed_columns: of each prediction among the packed rows.
    """

    inputs: dict[str, Any]
    rows: torch.Tensor
    columns: torch.Tensor
    packed_rows: torch.Tensor
    packed_columns: torch.Tensor


def _mask(segment: torch.Tensor, starts: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The additive mask (pairs, 1, packed, packed) for `segment`: 0 prompt, 1 chosen, 2 rejected, 3 padding."""
    size = segment.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    in_prompt = key == 0
    # To the rejected, the prompt's last token is the repeated one.
    last_of_prompt = torch.arange(size)[None, None, :] == torch.tensor(starts)[:, None, None] - 1
    allowed = causal & ((query == key) | (in_prompt & (query == 1)) | (in_prompt & (query == 2) & ~last_of_prompt))
    mask = torch.zeros(len(segment), 1, size, size, dtype=dtype)
    return mask.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)


def _pack(ids: torch.Tensor, lengths: list[int], starts: list[int], dtype: torch.dtype) -> _Packed:
    """Rows [chosen; rejected] of shape (2 * pairs, tokens) as one row for each pair.

    A packed row holds the prompt, the chosen completion, the prompt's last token once more, and the rejected
    completion; the last token of either completion predicts nothing and is left out. The repeated token is there
    because the prompt's end has to predict two first tokens.
    """
    pairs = len(ids) // 2
    rows, positions, labels, segment = [], [], [], []
    index = ([], [], [], [])
    for pair in range(pairs):
        start, end, end_rejected = starts[pair], lengths[pair], lengths[pairs + pair]
        chosen, rejected = ids[pair, :end], ids[pairs + pair, :end_rejected]
        rows.append(torch.cat([chosen[:-1], chosen[start - 1 : start], rejected[start:-1]]))
        positions.append(torch.cat([torch.arange(end - 1), torch.arange(start - 1, end_rejected - 1)]))
        ignore = ids.new_full((start - 1,), -100)
        labels.append(torch.cat([ignore, chosen[start:], rejected[start:]]))
        sizes = torch.tensor([start, end - 1 - start, end_rejected - start])
        segment.append(torch.repeat_interleave(torch.arange(3), sizes))
        for row, last, offset in ((pair, end, 0), (pairs + pair, end_rejected, end - start)):
            columns = range(start - 1, last - 1)
            index[0].extend([row] * len(columns))
            index[1].extend(columns)
            index[2].extend([pair] * len(columns))
            index[3].extend(column + offset for column in columns)

    def padded(parts: list[torch.Tensor], value: int = 0) -> torch.Tensor:
        return pad_sequence(parts, batch_first=True, padding_value=value)

    inputs = {
        "input_ids": padded(rows),
        "position_ids": padded(positions),
        "shift_labels": padded(labels, -100),
        "attention_mask": _mask(padded(segment, 3), starts[:pairs], dtype),
    }
    return _Packed(inputs, *(torch.tensor(i) for i in index))


def _one_row(ids: torch.Tensor, lengths: list[int], starts: list[int], device: torch.device) -> _Packed:
    """The same for a GPU: all pairs in one row."""
    row_ids, positions, labels, specs, index = segments(ids, lengths, starts)
    inputs = {"input_ids": row_ids, "position_ids": positions, "shift_labels": labels}
    inputs = {name: values.to(device) for name, values in inputs.items()}
    rows, columns, packed = (i.to(device) for i in index)
    return _Packed(
        inputs | {"prefix_seg_info": segment_keys(specs, device)}, rows, columns, torch.zeros_like(packed), packed
    )


def _packed(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> _Packed | None:
    """The batch with each prompt once; None if its rows are no pairs with equal prompts and something after them."""
    if len(ids) % 2:
        return None
    on_cpu, pairs = ids.device.type == "cpu", len(ids) // 2
    host_ids = ids.cpu()  # one copy; each comparison below would wait for the GPU
    lengths = mask.sum(dim=1).tolist()
    starts = (labels != -100).long().argmax(dim=1).tolist()
    if starts[:pairs] != starts[pairs:] or min(starts) <= (0 if on_cpu else 1):
        return None
    if any(not torch.equal(host_ids[i, : starts[i]], host_ids[pairs + i, : starts[i]]) for i in range(pairs)):
        return None
    return _pack(host_ids, lengths, starts, dtype) if on_cpu else _one_row(host_ids, lengths, starts, ids.device)


def _share(inner: PreTrainedModel) -> None:
    fused = inner.forward

    def forward(
        *args: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> ModelOutput:
        plain = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        packed = None
        if fused_lm_head and input_ids is not None and attention_mask is not None and labels is not None:
            packed = _packed(input_ids, attention_mask, labels, inner.dtype)
        if input_ids is None or packed is None:
            given = {name: value for name, value in plain.items() if value is not None}
            return fused(*args, **given, fused_lm_head=fused_lm_head, **kwargs)
        outputs = fused(*args, **packed.inputs, fused_lm_head=True, **kwargs)
        for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
            values = getattr(outputs, name)
            if values is not None:
                spread = values.new_zeros(len(input_ids), input_ids.shape[1] - 1)
                found = values[packed.packed_rows, packed.packed_columns]
                setattr(outputs, name, spread.index_put((packed.rows, packed.columns), found))
        return outputs

    inner.forward = forward


def self_test() -> None:
    """A tiny model gives the same log-probs packed and as two rows. It stays on the CPU.

    With a GPU, Unsloth's layers take no tensors of a CPU; there the self-test of `prompt_segments` compares.
    """
    from trl.trainer.utils import add_fused_lm_head

    if torch.cuda.is_available():
        return
    # The random numbers of a training run stay as they are.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=32, initializer_range=0.5, attn_implementation="eager", **sizes)
        model = LlamaForCausalLM(config).eval()
        add_fused_lm_head(model)
        ids = torch.tensor([[5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 0, 0], [5, 6, 7, 11, 0, 0], [1, 2, 12, 13, 14, 0]])
        starts = torch.tensor([3, 2, 3, 2])
        mask = (ids != 0).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(6) < starts[:, None]), -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, "fused_lm_head": True}
        rows = model(**batch).log_probs
        _share(model)
        shared = model(**batch).log_probs
    expect(torch.allclose(rows, shared, atol=1e-3), "a prompt computed once gives other log-probs")


def can_share(inner: PreTrainedModel) -> bool:
    """Whether `share_prompts` changes anything about `inner`, the model inside a PeftModel."""
    if inner.config.model_type not in _KNOWN:
        return False
    if inner.device.type == "cuda":  # the kernel takes 16 bits, on Ampere and later
        able = torch.cuda.get_device_capability(inner.device)[0] >= 8 and inner.dtype != torch.float32
        return ON_GPU and able and works("shared_prompt") and works("prompt_segments")
    return inner.device.type == "cpu" and works("shared_prompt")


def share_prompts(inner: PreTrainedModel) -> None:
    """Make `inner(..., fused_lm_head=True)` compute each pair's prompt once, if its batch is [chosen; rejected].

    `inner` is the model inside a PeftModel, after TRL's `add_fused_lm_head`. Batches that are no pairs with equal
    prompts (a row that truncation left without completion) run as before, and so do architectures not in `_KNOWN`.
    """
    if not can_share(inner):
        return
    if inner.device.type == "cuda":
        take_segments()
    _share(inner)

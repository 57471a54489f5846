"""One forward over [prompt, chosen, rejected]: the same log-probs as two sequences, with the prompt computed once.

DPOTrainer runs prompt + chosen and prompt + rejected as two rows. Here they are one row, with a mask that hides
chosen from rejected and position ids that start again after the prompt. The trainer is not changed: only the
model's forward is, and it returns what the trainer expects. On a GPU a mask of our own would cost the fused attention
kernels; there all pairs of a batch are segments of one row, for torch's attention over sequences of different lengths.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

# Architectures whose attention takes any mask and whose positions are all in position_ids.
_KNOWN = ("llama", "qwen2", "qwen3")
# Set to False, a GPU computes each pair as two rows: for benchmarks/gpu.py and tests, which compare.
ON_GPU = True


def _pack(ids: torch.Tensor, lengths: list[int], starts: list[int], dtype: torch.dtype) -> tuple:
    """Rows [chosen; rejected] of shape (2 * pairs, tokens) as one row for each pair.

    A packed row holds the prompt, the chosen completion, the prompt's last token once more, and the rejected
    completion; the last token of either completion predicts nothing and is left out. The repeated token is there
    because the prompt's end has to predict two first tokens.

    Returns:
        (ids, positions, next-token labels) of shape (pairs, packed), the additive mask (pairs, 1, packed, packed),
        and the index of each prediction: (row, column) among the rows given, then (row, column) among the packed.
    """
    pairs = len(ids) // 2
    rows, positions, labels, segments = [], [], [], []
    index = ([], [], [], [])
    for pair in range(pairs):
        start, end, end_rejected = starts[pair], lengths[pair], lengths[pairs + pair]
        chosen, rejected = ids[pair, :end], ids[pairs + pair, :end_rejected]
        rows.append(torch.cat([chosen[:-1], chosen[start - 1 : start], rejected[start:-1]]))
        positions.append(torch.cat([torch.arange(end - 1), torch.arange(start - 1, end_rejected - 1)]))
        ignore = ids.new_full((start - 1,), -100)
        labels.append(torch.cat([ignore, chosen[start:], rejected[start:]]))
        lengths_of_segments = torch.tensor([start, end - 1 - start, end_rejected - start])
        segments.append(torch.repeat_interleave(torch.arange(3), lengths_of_segments))
        for row, last, offset in ((pair, end, 0), (pairs + pair, end_rejected, end - start)):
            columns = range(start - 1, last - 1)
            index[0].extend([row] * len(columns))
            index[1].extend(columns)
            index[2].extend([pair] * len(columns))
            index[3].extend(column + offset for column in columns)
    segment = pad_sequence(segments, batch_first=True, padding_value=3)
    size = segment.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    in_prompt = key == 0
    # To the rejected, the prompt's last token is the repeated one.
    last_of_prompt = torch.arange(size)[None, None, :] == torch.tensor(starts[:pairs])[:, None, None] - 1
    allowed = causal & ((query == key) | (in_prompt & (query == 1)) | (in_prompt & (query == 2) & ~last_of_prompt))
    mask = torch.zeros(pairs, 1, size, size, dtype=dtype)
    mask.masked_fill_(~allowed[:, None], torch.finfo(dtype).min)
    padded = [
        pad_sequence(x, batch_first=True, padding_value=v) for x, v in ((rows, 0), (positions, 0), (labels, -100))
    ]
    return *padded, mask, [torch.tensor(i) for i in index]


def _segments(ids: torch.Tensor, lengths: list[int], starts: list[int]) -> tuple:
    """Rows [chosen; rejected] as one row of segments: each prompt but its last token, then its two completions.

    The prompt's last token opens either completion, since it has to predict both first tokens; the last token of a
    completion predicts nothing and is left out. A last segment, without completions, fills the row up to a multiple
    of 128 tokens: for each new width matrix kernels are chosen and loaded, and the fast ones want a multiple of 8.

    Returns:
        (ids, positions, next-token labels) of shape (1, tokens), (length of the prompt, lengths of its completions) for
        each pair, and the index of each prediction: (row, column) among the rows given, then the place in the one row.
    """
    pairs = len(ids) // 2
    parts, positions, labels, specs, index = [], [], [], [], ([], [], [])
    base = 0
    for pair in range(pairs):
        prompt = starts[pair] - 1
        parts.append(ids[pair, :prompt])
        positions.append(torch.arange(prompt))
        labels.append(ids.new_full((prompt,), -100))
        base += prompt
        sizes = []
        for row in (pair, pairs + pair):
            size = lengths[row] - 1 - prompt
            parts.append(ids[row, prompt : prompt + size])
            positions.append(torch.arange(prompt, prompt + size))
            labels.append(ids[row, prompt + 1 : prompt + 1 + size])
            index[0].extend([row] * size)
            index[1].extend(range(prompt, prompt + size))
            index[2].extend(range(base, base + size))
            sizes.append(size)
            base += size
        specs.append((prompt, sizes))
    if fill := -base % 128:
        parts.append(ids.new_zeros(fill))
        positions.append(torch.arange(fill))
        labels.append(ids.new_full((fill,), -100))
        specs.append((fill, []))
    flat = [torch.cat(x)[None] for x in (parts, positions, labels)]
    return *flat, specs, [torch.tensor(i) for i in index]


class _Keys(NamedTuple):
    """Which keys the queries of each segment see: a completion's, those of its prompt and its own up to themselves.

    Attributes:
        index: places of the keys in the one row, segment after segment; a prompt's come once for each that sees them.
        ends_q, ends_k: where the queries and keys of each segment end, after a 0; int32.
        longest_q, longest_k: of a segment.
    """

    index: torch.Tensor
    ends_q: torch.Tensor
    ends_k: torch.Tensor
    longest_q: int
    longest_k: int


def _keys(specs: list[tuple[int, list[int]]], device: torch.device) -> _Keys:
    """For segments as `_segments` gives them."""
    index, queries, base = [], [], 0
    for prompt, sizes in specs:
        start = base
        for size in (prompt, *sizes):
            own = torch.arange(start, start + size)
            index.append(own if start == base else torch.cat([torch.arange(base, base + prompt), own]))
            queries.append(size)
            start += size
        base = start
    keys = [len(seen) for seen in index]
    ends_q, ends_k = (torch.tensor([0, *sizes]).cumsum(0).int().to(device) for sizes in (queries, keys))
    return _Keys(torch.cat(index).to(device), ends_q, ends_k, max(queries), max(keys))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: _Keys, scale: float | None = None) -> torch.Tensor:
    """Attention of one row of segments, each of q, k, v and the result of shape (1, tokens, heads, size of a head)."""
    # Not x[0], whose backward pass fills a tensor with zeros and copies into it.
    q, k, v = q.squeeze(0), *(x.squeeze(0).index_select(0, keys.index) for x in (k, v))
    # Causal, and where there are more keys than queries, the last query sees all. `varlen_attn` of torch.nn.attention
    # is this with the cost of an operator written in Python, which at this size is as long as the kernels take.
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, keys.ends_q, keys.ends_k, keys.longest_q, keys.longest_k, 0.0, True, False, scale=scale
    )
    return out.unsqueeze(0)


def _take_segments() -> None:
    """Give Unsloth's layers an attention for `_Keys`, where they look for that of GRPO's shared prompts."""
    from unsloth.utils import attention_dispatch

    grpo = attention_dispatch._flex_shared_prefix_attention
    if getattr(grpo, "takes_keys", False):
        return

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, info: Any, **options: Any) -> torch.Tensor:
        return (_attend if isinstance(info, _Keys) else grpo)(q, k, v, info, **options)

    attend.takes_keys = True
    attention_dispatch._flex_shared_prefix_attention = attend


def can_share(inner: PreTrainedModel) -> bool:
    """Whether `share_prompts` changes anything about `inner`, the model inside a PeftModel."""
    if inner.config.model_type not in _KNOWN:
        return False
    if inner.device.type == "cuda":  # the kernel takes 16 bits, on Ampere and later
        return ON_GPU and torch.cuda.get_device_capability(inner.device)[0] >= 8 and inner.dtype != torch.float32
    return inner.device.type == "cpu"


def share_prompts(inner: PreTrainedModel) -> None:
    """Make `inner(..., fused_lm_head=True)` compute each pair's prompt once, where its batch is [chosen; rejected].

    `inner` is the model inside a PeftModel, after TRL's `add_fused_lm_head`. Batches that are no pairs with equal
    prompts (a row that truncation left without completion) run as before, and so do architectures not in `_KNOWN`.
    """
    if not can_share(inner):
        return
    on_cpu = inner.device.type == "cpu"
    if not on_cpu:
        _take_segments()
    fused = inner.forward

    def forward(
        *args: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> ModelOutput:
        plain = dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=fused_lm_head)
        if not fused_lm_head or labels is None or attention_mask is None or len(input_ids) % 2:
            return fused(*args, **{k: v for k, v in plain.items() if v is not None}, **kwargs)
        host_ids = input_ids.cpu()  # one copy, where each comparison below would wait for the GPU
        lengths = attention_mask.sum(dim=1).tolist()
        starts = (labels != -100).long().argmax(dim=1).tolist()
        pairs = len(input_ids) // 2
        same_prompts = starts[:pairs] == starts[pairs:] and min(starts) > (0 if on_cpu else 1)
        for i in range(pairs if same_prompts else 0):
            same_prompts &= torch.equal(host_ids[i, : starts[i]], host_ids[pairs + i, : starts[i]])
        if not same_prompts:
            return fused(*args, **plain, **kwargs)
        device = input_ids.device
        if on_cpu:
            ids, positions, packed_labels, mask, index = _pack(host_ids, lengths, starts, inner.dtype)
            attention = {"attention_mask": mask}
            row, column, packed_row, packed_column = index
        else:
            ids, positions, packed_labels, specs, index = _segments(host_ids, lengths, starts)
            attention = {"prefix_seg_info": _keys(specs, device)}
            row, column, packed_column = (i.to(device) for i in index)
            packed_row = torch.zeros_like(packed_column)
        outputs = fused(
            *args,
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            shift_labels=packed_labels.to(device),
            fused_lm_head=True,
            **attention,
            **kwargs,
        )
        for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
            values = getattr(outputs, name)
            if values is not None:
                spread = values.new_zeros(len(input_ids), input_ids.shape[1] - 1)
                setattr(outputs, name, spread.index_put((row, column), values[packed_row, packed_column]))
        return outputs

    inner.forward = forward

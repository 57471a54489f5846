"""One forward over [prompt, chosen, rejected]: the same log-probs as two sequences, with the prompt computed once.

DPOTrainer runs prompt + chosen and prompt + rejected as two rows. Here they are one row, with a mask that hides
chosen from rejected and position ids that start again after the prompt. The trainer is not changed: only the
model's forward is, and it returns what the trainer expects.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

# Architectures whose attention takes any mask and whose positions are all in position_ids.
_KNOWN = ("llama", "qwen2", "qwen3")


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


def share_prompts(inner) -> None:
    """Make `inner(..., fused_lm_head=True)` compute each pair's prompt once, where its batch is [chosen; rejected].

    `inner` is the model inside a PeftModel, after TRL's `add_fused_lm_head`. Batches that are no pairs with equal
    prompts (a row that truncation left without completion) run as before. So does a model on a GPU, whose fused
    attention kernels build their own mask.
    """
    if inner.device.type != "cpu" or inner.config.model_type not in _KNOWN:
        return
    fused = inner.forward

    def forward(*args, input_ids=None, attention_mask=None, labels=None, fused_lm_head=False, **kwargs):
        plain = dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=fused_lm_head)
        if not fused_lm_head or labels is None or attention_mask is None or len(input_ids) % 2:
            return fused(*args, **{k: v for k, v in plain.items() if v is not None}, **kwargs)
        lengths = attention_mask.sum(dim=1).tolist()
        starts = (labels != -100).long().argmax(dim=1).tolist()
        pairs = len(input_ids) // 2
        same_prompts = starts[:pairs] == starts[pairs:] and min(starts) > 0
        for i in range(pairs if same_prompts else 0):
            same_prompts &= torch.equal(input_ids[i, : starts[i]], input_ids[pairs + i, : starts[i]])
        if not same_prompts:
            return fused(*args, **plain, **kwargs)
        ids, positions, packed_labels, mask, index = _pack(input_ids, lengths, starts, inner.dtype)
        outputs = fused(
            *args,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            shift_labels=packed_labels,
            fused_lm_head=True,
            **kwargs,
        )
        row, column, packed_row, packed_column = index
        for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
            values = getattr(outputs, name)
            if values is not None:
                spread = values.new_zeros(len(input_ids), input_ids.shape[1] - 1)
                setattr(outputs, name, spread.index_put((row, column), values[packed_row, packed_column]))
        return outputs

    inner.forward = forward

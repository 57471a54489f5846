"""On a GPU: all pairs of a batch as segments of one row, for torch's attention over sequences of different lengths.

A mask of our own would cost the fused attention kernels. Unsloth's layers have a place for an attention over shared
prompts (`prefix_seg_info`, made for GRPO); ours is put there. `shared_prompt` decides when.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import unsloth
from torch.nn.functional import scaled_dot_product_attention

from helpers.patches import expect


class Keys(NamedTuple):
    """Which keys the queries of each segment see, up to themselves.

    A prompt and its chosen answer are one segment, which sees itself. A rejected answer sees its prompt and itself.
    """

    index: torch.Tensor  # the keys' places in the one row, by segment; those at the end are in no segment
    # (2, tokens): a token's two places in `index`; the second of a token that is there once is filler
    copies: torch.Tensor
    ends_q: torch.Tensor  # where the queries of each segment end, after a 0; int32
    ends_k: torch.Tensor  # its keys
    longest_q: int
    longest_k: int


def places(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """arange(begin, begin + size) for each of `begins` and its size, one after the other."""
    ends = sizes.cumsum()
    return np.arange(ends[-1]) + np.repeat(begins - ends + sizes, sizes)


def moved(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`; a GPU copies it from pinned memory, for which the CPU need not wait."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(array.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.numpy()[...] = array  # torch would wake threads up for it, which takes longer
    return pinned.to(device, non_blocking=True)


def segment_keys(sizes: list[list[int]], fill: int, device: torch.device) -> Keys:
    """The keys of each segment on `device`; `sizes` are those of prompt, chosen and rejected of each pair.

    The last `fill` tokens fill the batch up; no loss comes of them, so their keys have a gradient of 0. `index` is
    filled up too: batches of one width then mostly have equally many places in it.
    """
    prompt, chosen, rejected = np.array(sizes).T
    first, tokens = prompt + chosen, int(np.sum(sizes)) + fill
    begin = np.append(0, np.cumsum(first + rejected))
    runs = np.stack([begin[:-1], begin[:-1], begin[:-1] + first], axis=1), np.stack([first, prompt, rejected], axis=1)
    index = np.append(places(*(one.ravel() for one in runs)), np.arange(begin[-1], tokens))
    copies, place = np.empty((2, tokens), dtype=np.int64), np.arange(len(index))
    copies[1, index], copies[0, index[::-1]] = place, place[::-1]  # of those given to one token, the last is taken
    copies[1, copies[0] == copies[1]] = place[-1]
    queries, keys = (np.append(np.stack([first, second], axis=1), fill) for second in (rejected, prompt + rejected))
    index = np.append(index, np.full(-len(index) % (tokens // 2), tokens - 1))
    ends = moved(np.array([queries, keys]).cumsum(axis=1).astype(np.int32), device)
    ends_q, ends_k = torch.nn.functional.pad(ends, (1, 0))
    return Keys(moved(index, device), moved(copies, device), ends_q, ends_k, int(queries.max()), int(keys.max()))


class _Seen(torch.autograd.Function):
    """`x[keys.index]` for x of shape (tokens, ...). torch's own backward pass adds up row by row, in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(copies)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        return gradient.index_select(0, copies[0]) + gradient.index_select(0, copies[1]), None, None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys, scale: float | None = None) -> torch.Tensor:
    """Attention of one row of segments, each of q, k, v and the result of shape (1, tokens, heads, size of a head)."""
    # Not x[0], whose backward pass fills a tensor with zeros and copies into it.
    q, k, v = q.squeeze(0), *(_Seen.apply(x.squeeze(0), keys.index, keys.copies) for x in (k, v))
    # Causal; if there are more keys than queries, the last query sees all. `varlen_attn` of torch.nn.attention does
    # the same as an operator written in Python, which at this size costs as long as the kernels take.
    out, *_ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001  (see above)
        q, k, v, keys.ends_q, keys.ends_k, keys.longest_q, keys.longest_k, 0.0, True, False, scale=scale
    )
    return out.unsqueeze(0)


def take_segments() -> None:
    """Give Unsloth's layers an attention for `Keys`, where they look for that of GRPO's shared prompts."""
    from unsloth.models import llama, qwen3
    from unsloth.utils import attention_dispatch

    grpo = attention_dispatch._flex_shared_prefix_attention  # noqa: SLF001  (see above)
    if getattr(grpo, "__module__", None) == __name__:  # done already
        return

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, info: Any, **options: Any) -> torch.Tensor:
        return (_attend if isinstance(info, Keys) else grpo)(q, k, v, info, **options)

    attention_dispatch._flex_shared_prefix_attention = attend  # noqa: SLF001  (see above)
    # Positions that start again look like packed sequences, and to find where they start waits for the GPU.
    for place in (llama, qwen3):
        place.get_packed_info_from_kwargs = _not_packed(place.get_packed_info_from_kwargs)


def _not_packed(packed_info: Callable[..., Any]) -> Callable[..., Any]:
    def found(given: dict[str, Any], *others: Any) -> Any:
        return None if isinstance(given.get("prefix_seg_info"), Keys) else packed_info(given, *others)

    return found


def self_test() -> None:
    """Unsloth's attention sends two completions of one prompt to ours, which gives what attention under a mask gives.

    Without a GPU only the names are looked up; Unsloth's by its source, since its kernels can't be imported there.
    """
    schema = torch.ops.aten._flash_attention_forward.default._schema  # noqa: SLF001  (what is tested)
    names = [argument.name for argument in schema.arguments]
    expected = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    expect(names[:9] == expected and "scale" in names, f"torch's flash attention takes {names}")
    source = (Path(unsloth.__file__).parent / "utils" / "attention_dispatch.py").read_text(encoding="utf-8")
    for name in ("_flex_shared_prefix_attention", "context.prefix_seg_info"):
        expect(name in source, f"attention_dispatch.py of Unsloth has no {name}")
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8:
        _compare()


def _compare() -> None:
    from unsloth.utils import attention_dispatch as dispatch

    sizes = {"bsz": 1, "q_len": 8, "kv_seq_len": 8, "n_heads": 2, "head_dim": 16, "requires_grad": True}
    unused, keys = ("seq_info", "attention_mask", "causal_mask"), segment_keys([[3, 2, 2]], 1, torch.device("cuda"))
    context = dispatch.AttentionContext(**sizes, **dict.fromkeys(unused), prefix_seg_info=keys)
    config = dispatch.AttentionConfig(backend=dispatch.SDPA, n_kv_heads=2, n_groups=1)
    take_segments()
    drawn = torch.randn(3, 1, 2, 8, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    q, k, v = (one.bfloat16().requires_grad_() for one in drawn)
    found = dispatch.run_attention(config=config, context=context, Q=q, K=k, V=v).transpose(1, 2)
    segment = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3], device="cuda")
    seen = (segment[:, None] == segment) | ((segment == 0) & (segment[:, None] < 3))
    expected = scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=seen.tril())
    close = torch.allclose(found.float(), expected, atol=0.05)
    losses = (out[:, :, :-1].float().square().sum() for out in (found, expected))  # without the filler
    gradients = (torch.autograd.grad(loss, (q, k, v)) for loss in losses)
    close &= all(torch.allclose(one, other, atol=0.2, rtol=0.05) for one, other in zip(*gradients, strict=True))
    expect(close, "attention over segments gives other values than attention under a mask")

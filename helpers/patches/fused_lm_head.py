"""TRL's fused LM head outside its trainers: log-probs of the completions without storing the logits.

Scoring then uses the same computation as training, so policy and reference are rounded alike, and a batch takes as
little memory. `add_fused_lm_head` is in `trl.trainer.utils`, which TRL does not document.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from helpers.patches import expect, works
from helpers.patches.shared_prompt import share_prompts


@torch.no_grad()
def self_test() -> None:
    """The fused log-probs of a tiny model are those of its logits. GPT-2, since Unsloth leaves that as it is."""
    from trl.trainer.utils import add_fused_lm_head

    torch.random.default_generator.manual_seed(0)  # of the CPU alone
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.tensor([[1, 2, 3, 4, 5]], device=model.device)
    labels = ids.masked_fill(ids < 3, -100)
    logits = model(ids).logits[:, :-1].log_softmax(dim=-1)
    expected = logits.gather(2, ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
    add_fused_lm_head(model)
    found = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    expect(torch.allclose(found, expected, atol=1e-3), "the fused LM head gives other log-probs than the logits")


@contextlib.contextmanager
def own_forward(model: torch.nn.Module) -> Iterator[None]:
    """What the block puts on `model.forward` is taken off at its end."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            model.forward = before


@contextlib.contextmanager
def applied(inner: PreTrainedModel) -> Iterator[bool]:
    """In the block `inner(..., fused_lm_head=True)` gives log-probs, each pair's prompt computed once if possible.

    Yields False if the fused head can't be had. The model is then as it was, and takes no `fused_lm_head`.
    """
    with own_forward(inner):
        if fused := works("fused_lm_head"):
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(inner)
            share_prompts(inner)
        yield fused

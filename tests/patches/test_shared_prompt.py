"""The packed forward gives the log-probs and the gradients of the plain one."""

import math

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

import helpers
from helpers.data.load import load_pairs
from helpers.data.render import tokenize_pairs
from helpers.model.logps import pair_logps, with_reference
from helpers.patches import shared_prompt
from helpers.patches.fused_lm_head import own_forward
from helpers.patches.prompt_segments import _Seen, segment_keys  # _Seen serves a kernel that needs a GPU
from helpers.patches.shared_prompt import pack, share_prompts
from helpers.train.settings import DPOConfig
from helpers.train.trainer import make_trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy():
    """A policy in fp32 whose adapter is not zero, so that a wrong gradient shows.

    A model of its own: there and back to bf16 would round the shared one's rotary frequencies.
    """
    model, tokenizer = helpers.load_model("embedded")
    policy = helpers.add_lora(model).float()
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return policy, tokenizer


def batch(tokenizer, max_length=None):
    rows = [
        {"prompt_ids": list(range(100, 140)), "chosen_ids": [200, 201, 202, 2], "rejected_ids": [210, 2]},
        {"prompt_ids": list(range(300, 317)), "chosen_ids": [7], "rejected_ids": list(range(400, 430)) + [2]},
        {"prompt_ids": [1, 2, 3], "chosen_ids": [11, 12, 2], "rejected_ids": [11, 13, 2]},
    ]
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True, "use_cache": False}


def scores_and_gradient(policy, inputs):
    policy.zero_grad()
    out = policy(**inputs)
    chosen, rejected = out.log_probs.sum(dim=1).chunk(2)
    torch.nn.functional.softplus(rejected - chosen).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    return out, gradient.clone()


@pytest.mark.parametrize("max_length", [None, 41, 17], ids=["whole", "cut in the answer", "no answer left"])
def test_same_log_probs_and_gradient(policy, max_length):
    policy, tokenizer = policy
    inner = policy.get_base_model()
    inputs = batch(tokenizer, max_length)
    plain, plain_gradient = scores_and_gradient(policy, inputs)
    fused = inner.forward
    seen = []
    inner.forward = lambda *args, **kwargs: seen.append(kwargs["input_ids"].numel()) or fused(*args, **kwargs)
    share_prompts(inner)
    shared, shared_gradient = scores_and_gradient(policy, inputs)
    inner.forward = fused
    if max_length == 17:
        assert seen == [inputs["input_ids"].numel()]  # a row without completion: as before
    else:
        assert seen[0] < 0.75 * inputs["input_ids"].numel()
    for name in ("log_probs", "entropy", "mean_logits"):
        assert torch.allclose(plain[name], shared[name], atol=2e-4), name
    assert torch.equal(plain.is_top1, shared.is_top1)
    assert (plain_gradient - shared_gradient).norm() < 5e-3 * plain_gradient.norm()


def test_generation_and_plain_calls_are_unchanged(policy):
    policy, tokenizer = policy
    inner = policy.get_base_model()
    ids = torch.tensor([[1, 2, 3, 4]])
    before, fused = policy(ids).logits, inner.forward
    share_prompts(inner)
    after = policy(ids).logits
    text = policy.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2)
    inner.forward = fused
    assert torch.equal(before, after)
    assert text.shape[1] <= 7


def test_batches_that_the_collator_packs_give_the_same_losses_and_figures(policy, monkeypatch, tmp_path):
    policy, tokenizer = policy
    ids = tokenize_pairs(load_pairs().select(range(3)), tokenizer)
    ids = with_reference(ids, pair_logps(policy, tokenizer, ids))
    settings = {"output_dir": str(tmp_path), "bf16": False, "report_to": "none", "per_device_train_batch_size": 3}
    losses, figures, packings = [], [], []
    monkeypatch.setattr(shared_prompt, "pack", lambda *given, **named: packings.append(1) or pack(*given, **named))
    for workers in (0, 1):  # with workers the batch is packed in the forward
        config = DPOConfig(**settings | {"dataloader_num_workers": workers})
        with own_forward(policy.get_base_model()):
            trainer = make_trainer(policy, tokenizer, ids, ids, config)
            batch = next(iter(trainer.get_eval_dataloader()))
            assert len(packings) == 1 - workers
            packings.clear()
            with torch.no_grad():
                for name in batch.keys() - {"packed_pairs"} if not workers else ():
                    batch[name] = torch.zeros_like(batch[name])  # which the GPU has of it is not read
                losses.append(trainer.compute_loss(policy, batch).item())
            figures.append(dict(trainer._metrics["train"]))  # noqa: SLF001  (there is no loop here that logs them)
            assert len(packings) == workers
            packings.clear()
    assert losses[0] == losses[1] != math.log(2)
    assert figures[0] == figures[1] and len(figures[0]) > 8


def test_segments_of_one_row_give_the_same_log_probs_and_gradient(policy):
    """The layout for a GPU, here under a plain mask: segments see their own prompt and themselves."""
    policy, tokenizer = policy
    inputs = batch(tokenizer)
    plain, plain_gradient = scores_and_gradient(policy, inputs)
    packed = pack(
        inputs["input_ids"], inputs["attention_mask"], inputs["labels"], policy.get_base_model(), one_row=True
    )
    assert packed is not None
    keys = packed.inputs.pop("prefix_seg_info")
    ids = packed.inputs["input_ids"]
    lengths = inputs["attention_mask"].sum(dim=1)
    starts = (inputs["labels"] != -100).long().argmax(dim=1)
    chosen, rejected = (lengths - starts).chunk(2)
    sizes = torch.stack([starts[: len(chosen)] - 1, chosen, rejected], dim=1).tolist()
    assert sum(map(sum, sizes)) < 0.75 * inputs["attention_mask"].sum()
    assert ids.numel() % 128 == 0
    sizes.append([ids.numel() - sum(map(sum, sizes))])
    told, own = (packed.inputs["shift_labels"] != -100).sum(), len(packed.packed[1])
    assert own == (inputs["labels"] != -100).sum() and 0 <= told - own < 128 and told % 128 == 0
    pair = torch.cat([torch.full((sum(row),), i) for i, row in enumerate(sizes)])
    part = torch.cat([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in sizes])
    same = (part[:, None] == part[None, :]) | (part == 0)[None, :]
    allowed = (pair[:, None] == pair[None, :]) & same & torch.ones(len(pair), len(pair), dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, len(pair), len(pair)).masked_fill(~allowed, torch.finfo(torch.float32).min)
    # The same for the kernel: the last queries of a segment see all its keys.
    seen = torch.zeros_like(allowed)
    for q, q_end, k, k_end in zip(keys.ends_q, keys.ends_q[1:], keys.ends_k, keys.ends_k[1:], strict=False):
        rows, columns = torch.arange(q, q_end), keys.index[k:k_end]
        causal = torch.ones(len(rows), len(columns), dtype=torch.bool).tril(len(columns) - len(rows))
        seen[rows[:, None], columns[None, :]] = causal
    assert torch.equal(seen, allowed)
    assert keys.longest_q == keys.ends_q.diff().max() and keys.longest_k == keys.ends_k.diff().max()
    policy.zero_grad()
    out = policy(**packed.inputs, attention_mask=mask, fused_lm_head=True, use_cache=False)
    found = out.log_probs[packed.packed]
    spread = out.log_probs.new_zeros(plain.log_probs.shape).index_put(packed.given, found)
    assert torch.allclose(plain.log_probs, spread, atol=2e-4)
    chosen, rejected = spread.sum(dim=1).chunk(2)
    torch.nn.functional.softplus(rejected - chosen).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert (plain_gradient - gradient).norm() < 5e-3 * plain_gradient.norm()


def test_keys_that_come_more_than_once_add_up_to_the_gradient_of_their_token():
    keys = segment_keys([[3, 2, 4], [5, 1, 1]], 7, torch.device("cpu"))
    x = torch.randn(23, 2, 4, dtype=torch.float64, requires_grad=True)
    taken = _Seen.apply(x, keys.index, keys.copies)
    assert torch.equal(taken, x.index_select(0, keys.index)) and len(keys.index) % 11 == 0
    gradient = torch.randn_like(taken)
    gradient[keys.index >= 16] = 0  # the filler
    (found,) = torch.autograd.grad(taken, x, gradient)
    (expected,) = torch.autograd.grad(x.index_select(0, keys.index), x, gradient)
    assert torch.allclose(found, expected, atol=1e-12) and found[:3].abs().min() > 0

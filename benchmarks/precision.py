"""Where bf16 loses a trained adapter's update: python benchmarks/precision.py RUN [RUN ...]

Each RUN is the folder of a finished run of the embedded model on the bundled pairs (`benchmarks/learning_rate.py` and
`benchmarks/beta.py` leave some). Its 120 held-out pairs are scored by plain transformers and PEFT, policy and reference
alike, in several precisions that differ in one thing each. The last line is one JSON object: the mean log-ratio gap in
nats for each run and precision, its share of the one in 32 bits, and the mean absolute error of a pair.
"""

import argparse
import contextlib
import functools
import json
import os
from pathlib import Path

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the weights in 16 bits on a GPU too


def logps(model, collate, rows: list[dict], autocast: bool):
    """Summed log-probs of both sides, shape (2, pairs), in nats."""
    import torch

    device, parts = model.device, []
    context = torch.autocast(device.type, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    for start in range(0, len(rows), 8):
        batch = {name: tensor.to(device) for name, tensor in collate(rows[start : start + 8]).items()}
        with torch.no_grad(), context:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        of_tokens = logits[:, :-1].float().log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        parts.append((of_tokens * batch["completion_mask"][:, 1:]).sum(1).double().cpu().view(2, -1))
    return torch.cat(parts, dim=1)


def head_in_32_bits(model) -> None:
    """The LM head computes in 32 bits, on hidden states and weights that are what they were."""
    import torch

    head = model.get_output_embeddings()

    def forward(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), head.weight.float())

    head.forward = forward


def round_adapter(model) -> None:
    """The adapter's weights rounded to bf16."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.bfloat16().float()


def add_in_32_bits(model) -> None:
    """Each LoRA layer adds its update to the base's output in 32 bits, and hands the sum on so."""
    from peft.tuners.lora import Linear

    def forward(layer, x):
        update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        return layer.base_layer(x).float() + update.float()

    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.forward = functools.partial(forward, layer)


# What differs: (type of the base's weights, autocast to bf16, change of the policy, change of policy and reference).
WAYS = {
    "32 bits": ("float32", False, None, None),
    "adapter rounded to bf16, rest 32 bits": ("float32", False, round_adapter, None),
    "matrix products in bf16, residual stream 32 bits": ("float32", True, None, None),
    "matrix products in bf16, update added in 32 bits": ("float32", True, add_in_32_bits, None),
    "all bf16, update added in 32 bits": ("bfloat16", True, add_in_32_bits, None),
    "matrix products in bf16, residual stream and LM head 32 bits": ("float32", True, None, head_in_32_bits),
    "all bf16, LM head 32 bits": ("bfloat16", True, None, head_in_32_bits),
    "all bf16, as trained": ("bfloat16", True, None, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    from helpers import load_pairs, split_pairs, load_tokenizer  # first: Unsloth before transformers  # isort: skip
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from helpers.common import write_json
    from helpers.data.render import IDS, tokenize_pairs
    from helpers.model.embedded import embedded_model
    from helpers.run.folder import machine, versions

    device, tokenizer = "cuda" if torch.cuda.is_available() else "cpu", load_tokenizer("embedded")
    test = split_pairs(load_pairs())["test"].select(range(120))
    rows = tokenize_pairs(test, tokenizer).select_columns(list(IDS)).to_list()
    collate, gaps = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id), {}
    for way, (dtype, autocast, change_policy, change_both) in WAYS.items():
        base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=getattr(torch, dtype)).to(device)
        if change_both:
            change_both(base)
        reference = logps(base, collate, rows, autocast)
        for run in args.runs:
            policy = PeftModel.from_pretrained(base, str(run / "adapter"))
            if change_policy:
                change_policy(policy)
            changes = logps(policy, collate, rows, autocast) - reference
            gaps[run.resolve().name, way] = changes[0] - changes[1]
            base = policy.unload()
    table = []
    for (run, way), gap in gaps.items():
        exact = gaps[run, "32 bits"]
        line = {"run": run, "way": way, "gap": gap.mean().item(), "share": (gap.mean() / exact.mean()).item()}
        table.append(line | {"error_of_a_pair": (gap - exact).abs().mean().item()})
    result = {"machine": machine(), "versions": versions(), "table": table}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(table))


if __name__ == "__main__":
    main()

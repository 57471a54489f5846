"""TRL's DPOTrainer on transformers and PEFT alone, in a process of its own: what `train_dpo` is compared with.

It reads a JSON object a line, {"model", "adapter", "pairs", "output", "settings"}, and answers each with a line: the
log history of a training in 32 bits. The pairs are two files of JSON lines, "train" and "test". What TRL prints goes
to stderr.

TRL 1.15 computes log-probs from hidden states by a kernel in Triton, which needs a GPU. On a CPU its place is taken by
`LogProbs`, the same figures from all logits. The files of a dataset get names by chance: datasets would hash a
tokenizer of 262,144 tokens several times for each trainer, which takes longer than all the rest.
"""

import functools
import json
import os
import sys
import uuid
from pathlib import Path

import torch
import trl
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
if others := {"unsloth", "helpers"} & sys.modules.keys():
    sys.exit(f"not TRL alone: {others}")


class LogProbs:
    """Has what TRL asks of the class of its kernel."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        logits = torch.nn.functional.linear(hidden, weight, bias) * scale
        logits = (softcap * (logits / softcap).tanh() if softcap else logits) / temperature
        logps = logits.log_softmax(dim=-1)
        others = {
            "entropy": lambda: -(logps.exp() * logps).sum(dim=-1),
            "log_sum_sq_probs": lambda: (2 * logps).logsumexp(dim=-1),
            "mean_logits": lambda: logits.mean(dim=-1),
            "is_top1": lambda: logits.argmax(dim=-1) == targets,
        }
        found = [logps.gather(1, targets[:, None])[:, 0]]
        return *found, *(make() if name in outputs else None for name, make in others.items())


trl.trainer.utils._ChunkedLogProbFunction = LogProbs  # noqa: SLF001  (see above)
Hasher.hash = classmethod(lambda cls, value: uuid.uuid4().hex)
tokenizer_of = functools.cache(AutoTokenizer.from_pretrained)


@functools.cache
def sets_of(folder: str) -> dict[str, Dataset]:
    read = {}
    for name in ("train", "test"):
        lines = Path(folder, f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        read[name] = Dataset.from_list([json.loads(line) for line in lines])
    return read


for line in sys.stdin:
    asked = json.loads(line)
    base = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, asked["adapter"], is_trainable=True)
    config = trl.DPOConfig(output_dir=asked["output"], **asked["settings"])
    sets = sets_of(asked["pairs"])
    given = {"train_dataset": sets["train"], "eval_dataset": sets["test"]}
    trainer = trl.DPOTrainer(model, args=config, **given, processing_class=tokenizer_of(asked["model"]))
    trainer.train()
    print(json.dumps(trainer.state.log_history), file=answers, flush=True)

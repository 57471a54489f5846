"""Held-out preference accuracy of 03_train over three seeds: python benchmarks/seeds.py

Trains the embedded model (or DPO_MODEL) three times with the settings of `03_train`, each from a fresh adapter, and
prints one JSON object as its last line. It evaluates more often than the notebook, every fourth step, so that the
histories also tell what `diagnose` says of such a run when it is evaluated rarely or often. About twelve
minutes on two CPU cores with bf16.
"""

import json
import tempfile
from pathlib import Path
from statistics import mean

from helpers import add_lora, load_model, load_pairs, split_pairs, train_dpo
from helpers.run.folder import machine, versions
from helpers.run.metrics import accuracy_by

pairs = split_pairs(load_pairs())
train, test = pairs["train"].select(range(192)), pairs["test"]  # as in the notebook
results, by_flaw = [], []
with tempfile.TemporaryDirectory() as folder:
    for seed in (0, 1, 2):
        model, tokenizer = load_model()
        model = add_lora(model, seed=seed)
        run = train_dpo(model, tokenizer, train, test, Path(folder) / str(seed), seed=seed, eval_steps=4, save_steps=4)
        results.append({"seed": seed} | run.metrics | {"history": run.history})
        by_flaw.append(accuracy_by(run.held_out, "flaw").share.round(3).to_dict())
print(
    json.dumps(
        {
            "accuracy_mean": mean(result["accuracy"] for result in results),
            "reference_accuracy": results[0]["reference_accuracy"],
            "seeds": results,
            "by_flaw": by_flaw,
            "steps": run.info.steps,
            "versions": versions(),
            "machine": machine(),
        }
    )
)

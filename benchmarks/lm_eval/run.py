"""The panel of `retention` asked by lm-evaluation-harness, offline: python benchmarks/lm_eval/run.py MODEL OUT

MODEL is the folder of a merged model (`export_run(run, "merged", ...)`). OUT gets a JSON object: for each item 1 if the
reply is right, else 0, and for texts their log-prob in nats. `make harness` makes an environment that has lm_eval.
"""

import json
import sys
from pathlib import Path

import lm_eval
import torch
from lm_eval.tasks import TaskManager


def main(model: str, out: str) -> None:
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=["dpo_panel"],
        task_manager=TaskManager(include_path=str(Path(__file__).parent), include_defaults=False),
        apply_chat_template=True,
        batch_size=16,
        device="cuda" if torch.cuda.is_available() else "cpu",  # left out, it is "cuda"
        bootstrap_iters=0,
    )
    samples = [sample for every in found["samples"].values() for sample in every]
    items = {one["doc"]["id"]: one["acc"] if "acc" in one else float(one["filtered_resps"][0]) for one in samples}
    Path(out).write_text(json.dumps(items), encoding="utf-8")
    print(json.dumps(found["results"]))


if __name__ == "__main__":
    main(*sys.argv[1:])

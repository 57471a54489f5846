"""What thinking pairs teach, over three seeds: python benchmarks/thinking.py [--seeds 0 1 2] [--folder F]

Pairs and settings are those of `04_thinking_pairs`, on the embedded model: naive sets have the same 144 pairs without
their rejected thoughts.

Each seed starts with SFT on well-formed thoughts. DPO follows, once on pairs whose sides both think, once on naive
pairs (chosen thinks, rejected is an answer without a thought), both with the SFT loss of the chosen side added. The
first seed also does DPO without that loss, and DPO of either kind without SFT. All runs are tested on the same held-out
pairs, whose sides both think at similar length, and by replies to 80 held-out word problems; the notebook asks the
first 40 of them. It takes about three quarters of an hour on one CPU core. The last line is one JSON object.
"""

import argparse  # noqa: I001  (helpers before peft: it imports Unsloth first)
import json
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean

from helpers import (
    KINDS,
    accuracy_by,
    add_lora,
    generate_replies,
    load_model,
    load_thinking_pairs,
    machine,
    make_thinking_pairs,
    render_thinking,
    split_thinking,
    thought_table,
    train_dpo,
    train_sft,
    versions,
)

from peft import get_peft_model_state_dict, set_peft_model_state_dict

from helpers.common import write_json
from helpers.model.generate import repetition

HELD_OUT = ("everyday", "logic")  # topics of the written pairs; from here on as in the notebook
ONCE = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "learning_rate": 2e-4}
WITH_NLL = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]}

written, made = load_thinking_pairs(), make_thinking_pairs(1000)
lesson = [pair for pair in written if pair["topic"] not in HELD_OUT]
test = [pair for pair in written if pair["topic"] in HELD_OUT and pair["rejected_thought"]]
for kind in KINDS:
    test += [pair for pair in made[500:] if pair["flaw"] == kind][:30]
like = lesson + made[320:416]
naive = [pair | {"rejected_thought": None} for pair in like]
asked = made[420:500]


def replies_of(model, tokenizer) -> dict:
    prompts = [[{"role": "user", "content": pair["prompt"]}] for pair in asked]
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens=120, batch_size=40)
    table = thought_table(replies, [pair["answer"] for pair in asked], tokenizer)
    return table.mean().round(4).to_dict() | {
        "problems": Counter(problem for r in replies for problem in split_thinking(r.ids, tokenizer).problems),
        "repetition": round(mean(repetition(r.ids) for r in replies), 4),
    }


def one_seed(seed: int, folder: Path) -> dict:
    model, tokenizer = load_model("embedded")
    model = add_lora(model, seed=seed)
    results = {"seed": seed}

    def train(name: str, pairs: list[dict], test: list[dict] = test, **settings) -> None:
        data = [render_thinking(part, tokenizer) for part in (pairs, test)]
        settings |= ONCE
        run = train_dpo(model, tokenizer, *data, folder / f"{name} {seed}", seed=seed, **settings)
        results[name] = run.metrics | {
            "steps": run.info.steps,
            "by_flaw": accuracy_by(run.held_out, "flaw").round(4).to_dict("index"),
            "replies": replies_of(model, tokenizer),
        }

    fresh = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    if seed == 0:
        results["base"] = {"replies": replies_of(model, tokenizer)}
        train("both think without SFT", like, test[:24])  # only the replies matter here
        set_peft_model_state_dict(model, fresh)
        train("naive without SFT", naive, test[:24])
        set_peft_model_state_dict(model, fresh)
    losses = train_sft(model, tokenizer, render_thinking(lesson + made[:320], tokenizer), learning_rate=1e-3, seed=seed)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    results["SFT"] = {"losses": losses, "replies": replies_of(model, tokenizer)}
    train("naive", naive, **WITH_NLL)
    set_peft_model_state_dict(model, start)
    train("both think", like, **WITH_NLL)
    if seed == 0:
        set_peft_model_state_dict(model, start)
        train("both think without NLL", like)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keep each seed's result here, and do not run it again")
    args = parser.parse_args()
    seeds = []
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            kept = (args.folder or Path(folder)) / f"seed-{seed}.json"
            if not kept.is_file():
                write_json(kept, one_seed(seed, Path(folder)))
            seeds.append(json.loads(kept.read_text(encoding="utf-8")))
    accuracies = [result["both think"]["accuracy"] for result in seeds]
    print(
        json.dumps(
            {
                "asked": len(asked),
                "accuracy_mean": mean(accuracies),
                "accuracies": accuracies,
                "naive_accuracies": [result["naive"]["accuracy"] for result in seeds],
                "well_formed_before": [result["SFT"]["replies"]["well_formed"] for result in seeds],
                "well_formed_after": [result["both think"]["replies"]["well_formed"] for result in seeds],
                "seeds": seeds,
                "versions": versions(),
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()

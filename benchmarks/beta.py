"""The long beta sweep behind 05_beta_sweep: python benchmarks/beta.py --out benchmarks/results/beta.json

Six betas and three seeds of the embedded model, one epoch of the bundled training pairs (360; 120 held out), learning
rate 2e-4, batch 8, with two sampled replies to each held-out prompt. Held-out pairs are also scored on the way, so
that one can see whether the order of the betas has settled. The settings are those of the CPU profile on any machine;
a GPU only shortens the wait. Interrupted, the same command goes on.

`--out` is what `helpers.sweep.Sweep.load` reads. The last line is one JSON object: means by beta, the order by
log-ratio gap and by KL at each held-out evaluation and for each seed, and the recommendation.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the same settings, 16-bit weights, also where there is a GPU


def order(values) -> list[float]:
    """Betas from the largest value to the smallest."""
    return values.sort_values(ascending=False).index.tolist()


def main() -> None:
    from helpers import load_model, load_pairs, split_pairs
    from helpers.files import write_json
    from helpers.runs import output_folder
    from helpers.sweep import BETAS, recommend, sweep_beta

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--pairs", type=int, default=360, help="training pairs; a third as many are held out")
    parser.add_argument("--folder", type=Path, default=output_folder("beta_long"), help="of the runs; kept")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pairs = split_pairs(load_pairs())
    train, test = pairs["train"].select(range(args.pairs)), pairs["test"].select(range(args.pairs // 3))
    every = max(1, round(args.pairs * args.epochs / 8 / 5))
    model, tokenizer = load_model("embedded")
    sweep = sweep_beta(
        model,
        tokenizer,
        train,
        test,
        args.folder,
        betas=args.betas,
        seeds=range(args.seeds),
        prompts=len(test),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        eval_strategy="steps",
        eval_steps=every,
    )
    stored = json.loads((args.folder / "sweep.json").read_text(encoding="utf-8"))
    # Without the two paths.
    command = f"python benchmarks/beta.py --betas {' '.join(f'{beta:g}' for beta in args.betas)} --seeds {args.seeds}"
    command += f" --epochs {args.epochs:g} --learning-rate {args.learning_rate:g} --pairs {args.pairs}"
    write_json(args.out, {"command": command, **stored})
    held_out = sweep.history[sweep.history.split == "held out"]
    columns = ["accuracy", "log_ratio_gap", "margin", "kl", "chosen_change", "rejected_change", "reply_tokens"]
    means = sweep.finished.groupby("beta")[[*columns, "repetition", "ended", "weight_end"]].mean().round(4)
    print(
        json.dumps(
            {
                "means": means.reset_index().to_dict("records"),
                "order_by_gap_at_step": {
                    int(step): order(rows.groupby("beta").log_ratio_gap.mean())
                    for step, rows in held_out.groupby("step")
                },
                "order_by_gap_of_seed": {
                    int(seed): order(rows.set_index("beta").log_ratio_gap)
                    for seed, rows in sweep.finished.groupby("seed")
                },
                "order_by_kl_of_seed": {
                    int(seed): order(rows.set_index("beta").kl) for seed, rows in sweep.finished.groupby("seed")
                },
                "recommendation": recommend(sweep).reason,
                "failed": sweep.table[sweep.table.status != "finished"][["beta", "seed", "status"]].to_dict("records"),
                "versions": sweep.info["versions"],
                "machine": sweep.info["machine"],
            }
        )
    )


if __name__ == "__main__":
    main()

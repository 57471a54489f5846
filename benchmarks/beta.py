"""The long beta sweep behind 05_beta_sweep: python benchmarks/beta.py --out benchmarks/results/beta.json

Six betas and three seeds of the embedded model, one epoch of the bundled training pairs (360; 120 held out), learning
rate 2e-4, batch 8, with two sampled replies to each held-out prompt. Held-out pairs are also scored after every step,
which shows whether the order of the betas has settled, and what `diagnose` says however often it looks. The settings
are those of the CPU profile on any machine; a GPU only shortens the wait. After an interruption the same command goes
on. Several processes can share the betas and the seeds (`--betas 0.01 0.05`, `--seeds 2`); `--merge A.json B.json`
joins their files instead of training.

`helpers.train.sweep.Sweep.load` reads the file `--out`. The last line is one JSON object: means by beta, the order by
log-ratio gap and by KL at each held-out evaluation and for each seed, and the recommendation.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the same settings and 16-bit weights on a GPU too


def order(values) -> list[float]:
    """Betas from the largest value to the smallest."""
    return values.sort_values(ascending=False).index.tolist()


def main() -> None:
    from helpers.common import output_folder, write_json
    from helpers.train.sweep import BETAS, Sweep

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--pairs", type=int, default=360, help="training pairs; a third as many are held out")
    parser.add_argument("--folder", type=Path, default=output_folder("beta_long"), help="of the runs; it is kept")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="files that this script wrote, or sweep.json of its folders"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.merge:
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in args.merge]
        if any(part["info"]["identity"] != parts[0]["info"]["identity"] for part in parts):
            raise SystemExit("These files are of sweeps with other pairs, model or settings.")
        tables = {name: [row for part in parts for row in part[name]] for name in ("table", "history", "gaps")}
        stored = {"command": command(parts[0] | tables), "info": parts[0]["info"], **tables}
    else:
        stored = train(args)
    write_json(args.out, stored)
    print(json.dumps(summary(Sweep.load(args.out))))


def train(args) -> dict:
    from helpers import load_model, load_pairs, split_pairs
    from helpers.train.sweep import sweep_beta

    pairs = split_pairs(load_pairs())
    train, test = pairs["train"].select(range(args.pairs)), pairs["test"].select(range(args.pairs // 3))
    model, tokenizer = load_model("embedded")
    sweep_beta(
        model,
        tokenizer,
        train,
        test,
        args.folder,
        betas=args.betas,
        seeds=tuple(args.seeds),
        prompts=len(test),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        eval_strategy="steps",
        eval_steps=1,
    )
    stored = json.loads((args.folder / "sweep.json").read_text(encoding="utf-8"))
    return {"command": command(stored) + (f" --pairs {args.pairs}" if args.pairs != 360 else ""), **stored}


def command(stored: dict) -> str:
    """The command that makes these runs, without paths."""
    settings = stored["info"]["identity"]["settings"]
    betas, seeds = (sorted({row[name] for row in stored["table"]}) for name in ("beta", "seed"))
    return (
        f"python benchmarks/beta.py --betas {' '.join(f'{beta:g}' for beta in betas)} "
        f"--seeds {' '.join(f'{seed:g}' for seed in seeds)} "
        f"--epochs {settings['num_train_epochs']:g} --learning-rate {settings['learning_rate']:g}"
    )


def summary(sweep) -> dict:
    from helpers.after.recommend import recommend

    held_out = sweep.history[sweep.history.split == "held out"]
    columns = ["accuracy", "log_ratio_gap", "margin", "kl", "chosen_change", "rejected_change", "reply_tokens"]
    means = sweep.finished.groupby("beta")[[*columns, "repetition", "ended", "weight_end"]].mean().round(4)
    by_seed = {int(seed): rows.set_index("beta") for seed, rows in sweep.finished.groupby("seed")}
    return {
        "means": means.reset_index().to_dict("records"),
        "order_by_gap_at_step_of_seed": {
            f"{step}, {seed}": order(rows.set_index("beta").log_ratio_gap)
            for (step, seed), rows in held_out.groupby(["step", "seed"])
        },
        "order_by_gap_of_seed": {seed: order(rows.log_ratio_gap) for seed, rows in by_seed.items()},
        "order_by_kl_of_seed": {seed: order(rows.kl) for seed, rows in by_seed.items()},
        "recommendation": recommend(sweep).reason,
        "failed": sweep.table[sweep.table.status != "finished"][["beta", "seed", "status"]].to_dict("records"),
        "versions": sweep.info["versions"],
        "machine": sweep.info["machine"],
    }


if __name__ == "__main__":
    main()

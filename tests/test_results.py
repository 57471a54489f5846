"""The figures in the README are those of the committed results."""

import json
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def stated() -> list[str]:
    train, profile, memory, seeds = (result(name) for name in ("train", "profile_step", "memory", "seeds"))
    beta = pd.DataFrame(result("beta")["table"]).groupby("beta")[["log_ratio_gap", "kl", "accuracy"]].mean()
    thinking, sweep = result("thinking"), result("sweep")
    replies = thinking["asked"] * len(thinking["seeds"])
    before, after, naive = (
        round(sum(seed[name]["replies"]["well_formed"] * thinking["asked"] for seed in thinking["seeds"]))
        for name in ("SFT", "both think", "naive")
    )
    ratios = [case["estimated_gb"] / case["measured_gb"] for case in memory["cases"]]
    share = {name: f"{value:.0%}" for name, value in profile["share"].items()}
    return [
        ", ".join(f"{run['accuracy']:.3f}" for run in seeds["seeds"][:1]),
        f"mean {seeds['accuracy_mean']:.3f}",
        f"{train['plain_pairs_per_s']:.2f} and {train['ours_pairs_per_s']:.2f}",
        f"{train['speedup']:.2f} times as fast, with {train['peak_ratio']:.2f} times the memory",
        f"within {train['max_loss_difference_fp32']:.6f}",
        f"{train['mean_loss_difference']:.3f} apart on average, {train['max_loss_difference']:.2f} at most",
        f"{train['grouped_step_against_ours']:.2f}: nothing gained",
        f"{profile['step_gflop_per_s']:.0f} of the {profile['matrix_gflop_per_s']:.0f} GFLOP/s",
        f"LM head ({share['LM head']}",
        f"elementwise work ({share['elementwise and overhead']})",
        f"products ({share['projections']})",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        "gap " + ", ".join(f"{value:.1f}" for value in beta.log_ratio_gap),
        "KL " + ", ".join(f"{value:.1f}" for value in beta.kl),
        f"accuracy {beta.accuracy.min():.2f} to {beta.accuracy.max():.2f} at all",
        f"{sweep['wall_ratio']:.2f} of the time, {sweep['floor_ratio']:.2f} times its own forward and backward",
        f"alone, and {sweep['peak_ratio']:.2f} times the memory",
        ", ".join(f"{value:.3f}" for value in thinking["accuracies"]) + f"; mean {thinking['accuracy_mean']:.3f}",
        ", ".join(f"{value:.3f}" for value in thinking["naive_accuracies"])
        + f"; mean {mean(thinking['naive_accuracies']):.3f}",
        f"of {replies}: {before} before, {after} after, {naive} after naive pairs",
        *stated_of_gpus(),
    ]


def stated_of_gpus() -> list[str]:
    gpu, two = result("gpu"), result("two_gpus")
    sides, against = gpu["sides"], gpu["against_usual"]
    speed, apart = [two[name]["pairs_per_s"] for name in ("one", "two")], two["difference_of_two"]
    rows = [
        f"| {sides[name]['pairs_per_s']:.2f} | {sides[name]['peak_gb']:.2f} | {against[name]['times_usual']:.2f} |"
        for name in ("stock", "usual", "explicit", "ours", "offloaded", "kept", "two_rows", "two_rows_kept")
    ]
    ours, once = sides["ours"], sides["ours"]["pairs_per_s_with_reference_once"]
    furthest = max(side.get("max_loss_difference", 0) for side in against.values())
    return rows + [
        f"{once:.2f} pairs a second of the {ours['pairs_per_s']:.2f}: {once / sides['usual']['pairs_per_s']:.2f} times",
        f"{ours['tflop_per_s']:.0f} of the {gpu['matrix_tflop_per_s']} TFLOP/s",
        f"within {furthest:.3f} of the usual",
        f"{sides['two_rows_offloaded']['generation_tokens_per_s']:.0f} tokens a second",
        f"{speed[0]:.2f} and {speed[1]:.2f} pairs a second, {two['scaling']:.2f} times",
        f"within {apart:.4f} of each other; killed and resumed, within {two['difference_after_kill']:.4f}",
    ]


@pytest.mark.parametrize("text", stated())
def test_readme_states_what_was_measured(text):
    assert text in README

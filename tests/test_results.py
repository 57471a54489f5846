"""The figures in the README are those of the committed results."""

import json
import math
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
    gpu, two, sweep = result("gpu"), result("two_gpus"), result("sweep_gpu")
    sides, against = gpu["sides"], gpu["against_usual"]
    usual, ours = sides["usual"]["pairs_per_s"], sides["ours"]
    once, busy = ours["pairs_per_s_with_reference_once"], ours["gpu_busy_share"]
    kept, others, before = sides["kept"], gpu["same_card_other_hosts"], gpu["before_weights_were_cast_once"]
    not_estimated = ("stock", "explicit")
    estimates = {name: side["estimated_gb"] for name, side in sides.items() if name not in not_estimated}
    ratios = [estimate / sides[name]["peak_gb"] for name, estimate in estimates.items()]
    rows = []
    for name, side in sides.items():
        if name != "two_rows_offloaded":
            times = against[name].get("times_usual")
            cells = (side["pairs_per_s"], side["peak_gb"], estimates.get(name), side["gpu_busy_share"], times)
            rows.append("| " + " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    factors = [against["offloaded"]["times_usual"], *(host["offloaded_times_usual"] for host in others + before)]
    offloaded = sorted(factor for factor in factors if factor)
    waiting = [side for side in sides.values() if side["gpu_busy_share"] < 0.8]
    waits = [8e6 / side["pairs_per_s"] / side["kernels_a_step"] for side in waiting]
    less = sorted(host["ours_times_usual"] for host in before)

    def several(key: str) -> str:
        *most, last = (f"{host[key]:.2f}" for host in others)
        return ", ".join(most) + f" and {last}"

    furthest = math.ceil(1000 * max(side.get("max_loss_difference", 0) for side in against.values())) / 1000
    speed, wide = two["pairs_per_s"], two["one_of_32"]["pairs_per_s"]
    return rows + [
        f"{once:.2f} pairs a second of the {ours['pairs_per_s']:.2f}, {once / usual:.2f} times",
        f"{ours['tflop_per_s']:.0f} of the {gpu['matrix_tflop_per_s']} TFLOP/s",
        f"and {kept['tflop_per_s']:.0f} where there is room",
        f"that would be {ours['pairs_per_s'] / busy / usual:.1f} and "
        f"{kept['pairs_per_s'] / kept['gpu_busy_share'] / usual:.1f} times",
        f"the usual made {several('usual')} pairs a second",
        f"{several('ours_times_usual')} times that where memory is short",
        f"{several('kept_times_usual')} times where there is room",
        f"{before[0]['kernels_a_step']['ours'] - ours['kernels_a_step']:,} kernels more; five hosts gave "
        f"{less[0]:.2f} to {less[-1]:.2f} times",
        f"took {min(waits):.0f} to {max(waits):.0f} microseconds a kernel",
        f"machine's memory made {offloaded[0]:.2f} to {offloaded[-1]:.2f} times the usual",
        f"step 0 reads {against['two_rows']['step_0_loss']:.3f} and {against['two_rows_kept']['step_0_loss']:.3f}",
        f"With one forward for both it reads {against['ours']['step_0_loss']:.4f}",
        f"estimate was {min(ratios):.2f} to {max(ratios):.2f} times",
        f"within {furthest:.3f} of the usual",
        f"{ours['generation_tokens_per_s']:.0f} tokens a second",
        f"{sweep['wall_ratio']:.2f} of the time of five plain runs, with {sweep['peak_ratio']:.2f} times the memory",
        f"{speed[0]:.2f} and {speed[1]:.2f} pairs a second, {two['scaling']:.2f} times",
        f"within {two['difference_of_two']:.4f} of each other",
        f"within {two['difference_after_kill']:.4f} of those of the run in one piece",
        f"{wide:.2f} pairs a second with 32 in a forward; two are {speed[1] / wide:.2f} times",
    ]


@pytest.mark.parametrize("text", stated())
def test_readme_states_what_was_measured(text):
    assert text in README


def test_train_dpo_is_five_times_as_fast_as_the_usual_notebook_on_a_gpu_in_little_more_memory():
    gpu = result("gpu")
    ours = gpu["against_usual"]["ours"]
    runs = [(ours["times_usual"], ours["memory_of_usual"])]
    runs += [(host["ours_times_usual"], host["ours_memory_of_usual"]) for host in gpu["same_card_other_hosts"]]
    assert all(times >= 5 and memory <= 1.5 for times, memory in runs)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"{min(runs)[0]:.2f} to {max(runs)[0]:.2f} times on four hosts" in changes

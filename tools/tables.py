"""Write the README's tables of measured numbers from benchmarks/results: python tools/tables.py [--check]

Each table is between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`, and `TABLES` has the function that
makes it. With --check nothing is written, and the program fails if the README is not up to date.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SIDES = {
    "stock": "TRL without Unsloth: four times 2 pairs",
    "usual": "**usual**, Unsloth as most notebooks use it: four times 2 pairs, the reference in each step",
    "explicit": "usual, with a second model as the reference",
    "ours": "**`train_dpo` if memory is short**: 8 pairs at once, the reference's log-probs cached, one forward for "
    "both answers",
    "kept": "**`train_dpo` if there is room**, as on this card: the same without gradient checkpointing",
    "offloaded": 'with checkpointing, layer inputs in the machine\'s memory (`"unsloth"`)',
    "two_rows": "with checkpointing, two rows a pair",
    "two_rows_kept": "without checkpointing, two rows a pair",
    "ours_1024": "twice as many tokens, memory short",
    "kept_1024": "twice as many tokens, with room",
}


def result(name: str) -> Any:
    """What benchmarks/results/NAME.json holds."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table; the first row is its head."""
    head, *others = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *others))


def listed(values: list, digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def span(values: list, digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def by_beta() -> dict[float, dict[str, float]]:
    """Means over the seeds of `beta.json`, by beta."""
    rows = defaultdict(list)
    for row in result("beta")["table"]:
        rows[row["beta"]].append(row)
    columns = ("log_ratio_gap", "kl", "accuracy")
    return {beta: {name: mean(row[name] for row in rows[beta]) for name in columns} for beta in sorted(rows)}


def summary() -> str:
    seeds, train, beta = result("seeds"), result("train"), by_beta()
    first, *_, last = beta
    accuracy = span([row["accuracy"] for row in beta.values()])
    return table(
        ("measured", ""),
        (
            f"chosen told from rejected, {seeds['seeds'][0]['pairs']} pairs on held-out topics",
            f"{seeds['reference_accuracy']:.2f} before training, {seeds['accuracy_mean']:.3f} after it "
            "(mean of three seeds)",
        ),
        (
            "training speed on two cores, as the usual notebook does it and as `train_dpo` does it",
            f"{train['plain_pairs_per_s']:.2f} and {train['ours_pairs_per_s']:.2f} pairs a second",
        ),
        (
            "six betas, three seeds",
            f"from beta {first:g} to {last:g} the KL falls from {beta[first]['kl']:.1f} to {beta[last]['kl']:.1f} nats "
            f"a reply; accuracy {accuracy} at all of them",
        ),
    )


def gpu_sides() -> str:
    gpu = result("gpu")
    rows = [("setting", "pairs a second", "peak GB", "estimated", "busy", "times the usual")]
    for name, words in SIDES.items():
        side = gpu["sides"][name]
        # The estimate knows nothing of TRL without Unsloth, nor of a second model.
        estimate = None if name in ("stock", "explicit") else side["estimated_gb"]
        times = gpu["against_usual"][name].get("times_usual")
        cells = (side["pairs_per_s"], side["peak_gb"], estimate, side["gpu_busy_share"], times)
        rows.append((words, *("" if cell is None else f"{cell:.2f}" for cell in cells)))
    return table(*rows)


def gpu_ways() -> str:
    """The usual notebook and the two ways of `train_dpo`, side by side."""
    gpu = result("gpu")
    sides = [gpu["sides"][name] for name in ("usual", "ours", "kept")]
    usual, *ours = sides
    rate = usual["pairs_per_s"]
    others, before = gpu["same_card_other_hosts"], gpu["before_weights_were_cast_once"]
    more = before[0]["kernels_a_step"]["ours"] - ours[0]["kernels_a_step"]
    once = [side["pairs_per_s_with_reference_once"] for side in ours]
    return table(
        ("", "usual", "`train_dpo`, memory short", "`train_dpo`, with room"),
        ("pairs a second", *(f"{side['pairs_per_s']:.2f}" for side in sides)),
        (
            "the same with the pass for the cached log-probs, if each pair is trained on once (times the usual)",
            f"{rate:.2f}",
            *(f"{value:.2f} ({value / rate:.2f})" for value in once),
        ),
        ("kernels a step", *(f"{side['kernels_a_step']:,}" for side in sides)),
        ("share of a step that the GPU waits for the CPU", *(f"{1 - side['gpu_busy_share']:.0%}" for side in sides)),
        (
            "times the usual's rate if the GPU never waited",
            "",
            *(f"{side['pairs_per_s'] / side['gpu_busy_share'] / rate:.1f}" for side in ours),
        ),
        (
            f"TFLOP/s; large bf16 products reach {gpu['matrix_tflop_per_s']}",
            *(f"{side['tflop_per_s']:.0f}" for side in sides),
        ),
        (
            "three other hosts with the same card: pairs a second, then times that",
            *(listed([host[key] for host in others]) for key in ("usual", "ours_times_usual", "kept_times_usual")),
        ),
        (
            f"five hosts, before LoRA's weights were cast once a batch ({more:,} kernels a step more), times the usual",
            "",
            *(span([host[key] for host in before]) for key in ("ours_times_usual", "kept_times_usual")),
        ),
    )


def gpu_figures() -> str:
    gpu, sweep = result("gpu"), result("sweep_gpu")
    sides, against = gpu["sides"], gpu["against_usual"]
    estimated = [side for name, side in sides.items() if name not in ("stock", "explicit")]
    waiting = [side for side in sides.values() if side["gpu_busy_share"] < 0.8]
    hosts = gpu["same_card_other_hosts"] + gpu["before_weights_were_cast_once"]
    offloaded = [host["offloaded_times_usual"] for host in hosts if host["offloaded_times_usual"]]
    step_0 = [against[name]["step_0_loss"] for name in ("two_rows", "two_rows_kept")]
    return table(
        ("also measured", ""),
        (
            "memory estimate against the measured peak",
            span([side["estimated_gb"] / side["peak_gb"] for side in estimated]),
        ),
        (
            "microseconds a kernel, for the settings whose GPU waits",
            span([8e6 / side["pairs_per_s"] / side["kernels_a_step"] for side in waiting], 0),
        ),
        (
            "times the usual with layer inputs in the machine's memory, on all hosts and at older states of the code",
            span([against["offloaded"]["times_usual"], *offloaded]),
        ),
        (
            "largest difference to the usual's loss, at any step of any setting",
            f"{max(side.get('max_loss_difference', 0) for side in against.values()):.3f}",
        ),
        (
            "loss at step 0 with a cached reference and two rows a pair, with and without checkpointing",
            listed(step_0, 3),
        ),
        ("loss at step 0 with one forward for both answers", f"{against['ours']['step_0_loss']:.4f}"),
        (
            "sampling, twenty replies at a time",
            f"{sides['ours']['generation_tokens_per_s']:.0f} tokens a second",
        ),
        (
            f"five betas in one sweep, {sweep['pairs'] // 8} steps each, against five plain runs "
            "(`python benchmarks/sweep.py --pairs 80 --model FOLDER`)",
            f"{sweep['wall_ratio']:.2f} of the time, {sweep['peak_ratio']:.2f} times the memory; "
            f"{sweep['floor_seconds']:.0f} of its {sweep['sweep_seconds']:.0f} s are forward and backward passes",
        ),
    )


def measured() -> str:
    return table(("what", "result", "command"), *_preferences(), *_speed(), *_beta(), _thinking())


def _preferences() -> list[tuple[str, str, str]]:
    seeds = result("seeds")
    each = [
        f"{run['accuracy']:.3f} ({' to '.join(f'{end:.2f}' for end in run['accuracy_interval'])})"
        for run in seeds["seeds"]
    ]
    low, high = seeds["seeds"][0]["reference_accuracy_interval"]
    return [
        (
            f"held-out preference accuracy of `03_train`, {seeds['seeds'][0]['pairs']} pairs on topics not trained "
            "on, three seeds (95% intervals)",
            f"{', '.join(each)}; mean {seeds['accuracy_mean']:.3f}",
            "`python benchmarks/seeds.py`",
        ),
        (
            "the same model before training: chosen more likely per token",
            f"{seeds['reference_accuracy']:.2f} ({low:.2f} to {high:.2f})",
            "the same",
        ),
    ]


def _speed() -> list[tuple[str, str, str]]:
    train, profile, memory = result("train"), result("profile_step"), result("memory")
    share = {name: f"{value:.0%}" for name, value in profile["share"].items()}
    return [
        (
            "pairs a second on two cores, training as the usual notebook does it and as `train_dpo` does it, three "
            "epochs of 480 pairs, side by side",
            f"{train['plain_pairs_per_s']:.2f} and {train['ours_pairs_per_s']:.2f}: {train['speedup']:.2f} times as "
            f"fast, with {train['peak_ratio']:.2f} times the memory",
            "`python benchmarks/train.py`",
        ),
        (
            "do both compute the same? loss of each step, compared",
            f"fp32: within {train['max_loss_difference_fp32']:.6f}; bf16: {train['mean_loss_difference']:.3f} apart on "
            f"average, {train['max_loss_difference']:.2f} at most",
            "the same",
        ),
        (
            "batches of similar length, against ours",
            f"{train['grouped_step_against_ours']:.2f}: nothing gained on these pairs, so it is left out",
            "the same",
        ),
        (
            "what bounds a step now",
            f"{profile['step_gflop_per_s']:.0f} of the {profile['matrix_gflop_per_s']:.0f} GFLOP/s that two large "
            f"matrices reach; LM head ({share['LM head']}: product, softmax, the logged entropy) and elementwise work "
            f"({share['elementwise and overhead']}) take more than the layers' products ({share['projections']})",
            "`python tools/profile_step.py`",
        ),
        (
            f"memory estimate before training against {len(memory['cases'])} measured runs",
            span([case["estimated_gb"] / case["measured_gb"] for case in memory["cases"]]),
            "`python benchmarks/memory.py`",
        ),
    ]


def _beta() -> list[tuple[str, str, str]]:
    beta, sweep = by_beta(), result("sweep")
    gap, kl, accuracy = ([row[name] for row in beta.values()] for name in ("log_ratio_gap", "kl", "accuracy"))
    return [
        (
            "what beta does: six betas, three seeds, 45 steps; mean log-ratio gap and KL on held-out pairs, in nats",
            f"at beta {', '.join(f'{one:g}' for one in beta)}: gap {listed(gap, 1)}; KL {listed(kl, 1)}; accuracy "
            f"{span(accuracy)} at all of them. A higher beta holds the policy nearer to the reference",
            "`python benchmarks/beta.py` (on an H100)",
        ),
        (
            f"five betas in one sweep against five plain runs, one epoch of {sweep['pairs']} pairs each, side by side",
            f"{sweep['wall_ratio']:.2f} of the time, {sweep['floor_ratio']:.2f} times its own forward and backward "
            f"passes alone, and {sweep['peak_ratio']:.2f} times the memory",
            "`python benchmarks/sweep.py`",
        ),
    ]


def _thinking() -> tuple[str, str, str]:
    thinking = result("thinking")
    naive = thinking["naive_accuracies"]
    replies = thinking["asked"] * len(thinking["seeds"])
    before, after, after_naive = (
        round(sum(seed[name]["replies"]["well_formed"] for seed in thinking["seeds"]) * thinking["asked"])
        for name in ("SFT", "both think", "naive")
    )
    return (
        "144 thinking pairs whose sides both think at similar length, 172 held out, three seeds",
        f"{listed(thinking['accuracies'], 3)}; mean {thinking['accuracy_mean']:.3f}. With 72 naive pairs "
        f"{listed(naive, 3)}; mean {mean(naive):.3f}. Well-formed replies of {replies}: {before} before, {after} "
        f"after, {after_naive} after naive pairs",
        "`python benchmarks/thinking.py`",
    )


def two_gpus() -> str:
    two = result("two_gpus")
    (one, both), wide = two["pairs_per_s"], two["one_of_32"]["pairs_per_s"]
    peaks = [gb for cards in two["peak_gb"] for gb in cards.values()]
    return table(
        ("on one and two H100, the model of random weights in bf16, 64 pairs a step, 16 in a forward", ""),
        ("pairs a second", f"{one:.2f} and {both:.2f}: {two['scaling']:.2f} times"),
        (
            "one process with 32 pairs in a forward, another time",
            f"{wide:.2f} pairs a second; two are {both / wide:.2f} times that",
        ),
        ("losses of one and two processes (0.01 is allowed in bf16)", f"within {two['difference_of_two']:.4f}"),
        (
            "losses after SIGKILL and resuming, against the run in one piece",
            f"within {two['difference_after_kill']:.4f}",
        ),
        ("memory on each card", f"{span(peaks, 1)} GB"),
    )


TABLES = {
    "summary": summary,
    "gpu-sides": gpu_sides,
    "gpu-ways": gpu_ways,
    "gpu-figures": gpu_figures,
    "measured": measured,
    "two-gpus": two_gpus,
}


def current(text: str) -> str:
    """`text` with every table made anew from the results.

    Raises:
        ValueError: `text` lacks one of the tables.
    """
    for name, make in TABLES.items():
        begin, end = (f"<!-- {name}: {word} -->\n" for word in ("begin", "end"))
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"README.md has no table {name}")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def main(arguments: list[str]) -> None:
    old = README.read_text(encoding="utf-8")
    new = current(old)
    if "--check" not in arguments:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit("The README's tables are not those of benchmarks/results: python tools/tables.py")


if __name__ == "__main__":
    main(sys.argv[1:])

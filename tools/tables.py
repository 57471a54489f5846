"""Write the tables of measured numbers from benchmarks/results into the pages: python tools/tables.py [--check]

Each table is between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`. `TABLES` names the tables of each
page and the functions that make them. With --check nothing is written, and the program fails if a page is not current.
"""

import json
import math
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from helpers.run.metrics import seed_interval
from helpers.teach import loss_runs

ROOT = Path(__file__).parent.parent
SIDES = {
    "stock": "TRL without Unsloth: four times 2 pairs",
    "usual": "**usual**, Unsloth as most notebooks use it: four times 2 pairs, the reference in each step",
    "explicit": "usual, with a second model as the reference",
    "ours": "**`train_dpo` if memory is short**: 8 pairs at once, the reference's log-probs cached, one forward for both answers",
    "kept": "**`train_dpo` if there is room**, as on this card: the same without gradient checkpointing",
    "offloaded": 'with checkpointing, layer inputs in the machine\'s memory (`"unsloth"`)',
    "two_rows": "with checkpointing, two rows a pair",
    "two_rows_kept": "without checkpointing, two rows a pair",
    "ours_1024": "twice as many tokens, memory short",
    "kept_1024": "twice as many tokens, with room",
}
FAIR = {
    "stock": "TRL as usual",
    "stock_best": "TRL at its best: 8 at once, cached reference, no checkpointing",
    "usual": "Unsloth as usual",
    "expert": "Unsloth, 8 at once, cached reference; layer inputs in the machine's memory",
    "expert_on_card": "the same, layer inputs on the card",
    "expert_offload": "layer inputs in the machine's memory, and 12 layers too (`offload_layers`)",
    "ours": "**`train_dpo` if memory is short**",
    "expert_skip": 'Unsloth, 8 at once, cached reference; `checkpoint_skip_layers="auto"`',
    "expert_kept": "the same without checkpointing",
    "expert_graphs": "without checkpointing, compiled block with CUDA graphs, widths of multiples of 48",
    "expert_bf16": "without checkpointing, the base in bf16 and not NF4",
    "kept": "**`train_dpo` if there is room**",
}
NOT_ESTIMATED = ("stock", "explicit")  # the estimate knows nothing of TRL without Unsloth, nor of a second model


def result(name: str) -> Any:
    """What benchmarks/results/NAME.json holds."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def listed(values: Iterable[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def span(values: Collection[float], digits: int = 2) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def over_seeds(values: list[float], digits: int) -> str:
    """The mean of `values`, one a seed, and its 95 percent interval over the seeds."""
    return f"{mean(values):.{digits}f} ± {seed_interval(values):.{digits}f}"


def with_half(figure: list[float | None], digits: int) -> str:
    """A mean and half of its interval, as benchmarks store them; one seed has no interval."""
    value, half = figure
    text = f"{round(value, digits) + 0:.{digits}f}"  # + 0: no "-0.0"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def by_beta(column: str) -> dict[float, list[float]]:
    """A column of `beta.json` by beta, a value for each seed."""
    rows = result("beta")["table"]
    betas = sorted({row["beta"] for row in rows})
    return {beta: [row[column] for row in rows if row["beta"] == beta] for beta in betas}


def replies(name: str, what: str) -> list[float]:
    """For each seed of `thinking.json`, how many replies after the training `name` are so ("right", "well_formed")."""
    found = result("thinking")
    return [seed[name]["replies"][what] * found["asked"] for seed in found["seeds"]]


def thinking_row(digits: int) -> dict[str, str]:
    """The figures of `thinking.json` that the README and docs/results.md quote."""
    found = result("thinking")
    before, after = (replies(name, "right") for name in ("SFT", "both think"))
    change = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "both": over_seeds(found["accuracies"], digits),
        "naive": over_seeds(found["naive_accuracies"], digits),
        "seeds": f"{len(found['seeds'])}",
        "replies": f"{found['asked'] * len(found['seeds'])}",
        "before": f"{sum(before):.0f}",
        "after": f"{sum(after):.0f}",
        "chance": "" if abs(mean(change)) > seed_interval(change) else ", which may be chance",
    }


def with_reference(name: str) -> float:
    """Pairs a second on the GPU where each pair is trained on once and the reference's pass is counted."""
    side = result("gpu")["sides"][name]
    return side.get("pairs_per_s_with_reference_once", side["pairs_per_s"])


def summary() -> str:
    seeds, train, kl, thinking = result("seeds"), result("train"), by_beta("kl"), thinking_row(2)
    accuracy = [mean(values) for values in by_beta("accuracy").values()]
    fair = result("gpu_expert")["hosts"][0]["against_best"]
    flaws = {flaw: [seed[flaw] for seed in seeds["by_flaw"]] for flaw in seeds["by_flaw"][0]}
    best_first = sorted(flaws, key=lambda flaw: -mean(flaws[flaw]))
    by_flaw = ", ".join(f"{flaw} {span(flaws[flaw])}" for flaw in best_first)
    return f"""
| question | measured |
|---|---|
| Does training on other topics move the model towards the chosen answers? | yes, by implicit reward: {listed((seed["accuracy"] for seed in seeds["seeds"]), 3)} of {seeds["seeds"][0]["pairs"]} held-out pairs (three seeds; a coin gives 0.5, and before training every pair is a tie) |
| Which flaws does it learn to reject? | the same by flaw: {by_flaw} |
| Does a higher beta enforce the preferences harder? | no: from beta {min(kl):g} to {max(kl):g} the model stays nearer to where it was (KL {over_seeds(kl[min(kl)], 1)} to {over_seeds(kl[max(kl)], 1)} nats a reply: means and 95% intervals of {len(kl[min(kl)])} seeds), with accuracy {span(accuracy)} at every beta |
| Do thinking pairs teach better thinking? | they move the model towards good thoughts and away from bad ones: {thinking["both"]} of the held-out pairs by implicit reward if both sides think, {thinking["naive"]} if only the chosen does (means and 95% intervals of {thinking["seeds"]} seeds). But right final answers went from {thinking["before"]} to {thinking["after"]} of {thinking["replies"]}{thinking["chance"]} |
| How fast is `train_dpo`? | on an H200, with random weights in the shape of Qwen3-4B, if memory is short, an epoch is {fair["ours"]["times_best"]:.1f} times as fast as the best that an expert sets up by hand with Unsloth; with room, {fair["kept"]["times_best"]:.1f} times. The steps alone, without the pass for the reference: {fair["ours"]["times_best_by_step"]:.1f} and {fair["kept"]["times_best_by_step"]:.1f} times. On two CPU cores, {train["speedup"]:.2f} times the usual notebook |
"""


def gpu_expert() -> str:
    """`train_dpo` against the best side of an expert and against the usual notebook, on each host."""
    hosts = result("gpu_expert")["hosts"]

    def row(words: str, of: str, key: str) -> str:
        cells = [listed(host[of][name][key] for host in hosts) for name in ("ours", "kept")]
        return f"| {words} | {' | '.join(cells)} |\n"

    def held(name: str) -> str:
        best = [(host["sides"], host["against_best"][name]["best"]) for host in hosts]
        return listed(sides[name]["reserved_gb"] / sides[other]["reserved_gb"] for sides, other in best)

    def gpu_seconds(side: dict) -> float:
        return side["gpu_busy_share"] / side["pairs_per_s"]

    def never_waiting(name: str, experts: list[str]) -> str:
        return listed(
            min(gpu_seconds(host["sides"][one]) for one in experts) / gpu_seconds(host["sides"][name]) for host in hosts
        )

    def best(name: str) -> str:
        return ", ".join(f"`{host['against_best'][name]['best']}`" for host in hosts)

    short = never_waiting("ours", ["expert", "expert_on_card", "expert_offload"])
    room = never_waiting("kept", ["expert_skip", "expert_kept", "expert_graphs", "expert_bf16"])
    rows = [
        row("**the best that an expert would set up by hand**, one epoch", "against_best", "times_best"),
        f"| which that is, by its name in `benchmarks/gpu.py` | {best('ours')} | {best('kept')} |\n",
        row("the same, the fastest turn of each side", "against_best", "times_best_in_best_turn"),
        row("the same, steps alone without the reference's pass", "against_best", "times_best_by_step"),
        f"| the same, if the GPU never waited: by the time of its kernels in a step | {short} | {room} |\n",
        row("memory of the best: what tensors take at most", "against_best", "memory_of_best"),
        f"| the same: what torch holds of the card at most | {held('ours')} | {held('kept')} |\n",
        row("**the usual notebook**, one epoch", "against_usual", "times_usual_one_epoch"),
    ]
    return f"""
| pairs a second of `train_dpo`, as times those of | memory short | with room |
|---|---|---|
{"".join(rows)}"""


def gpu_recorded() -> str:
    """The sides of `train_dpo` with and without CUDA graphs, and the expert's best of each kind."""
    sides, rows = result("gpu_recorded")["sides"], []
    words = FAIR | {f"{name}_one_by_one": f"{FAIR[name]}, without CUDA graphs" for name in ("ours", "kept")}
    for name, side in sides.items():
        epoch = 1 / (1 / side["pairs_per_s"] + 1 / side["reference_pairs_per_s"])
        rates = " | ".join(f"{rate:.1f}" for rate in (epoch, side["pairs_per_s"], side["reference_pairs_per_s"]))
        rest = f"{side['gpu_busy_share']:.2f} | {side['peak_gb']:.1f} | {side['warm_up_seconds']:.0f}"
        by = "Unsloth, 8 at once, cached reference, " * name.startswith("expert")
        rows.append(f"| {by}{words[name].removeprefix('the same, ')} | {rates} | {rest} |\n")
    return f"""
| side | pairs a second, one epoch | steps alone | reference's pass | busy | peak GB | seconds of the first six steps |
|---|---|---|---|---|---|---|
{"".join(rows)}"""


def gpu_fair() -> str:
    """All sides of the fair table: each cell has the figure of each host."""
    hosts = result("gpu_expert")["hosts"]
    rows = []
    for name, words in FAIR.items():
        sides = [host["sides"][name] for host in hosts if name in host["sides"]]
        if "error" in sides[0]:
            rows.append(f"| {words} | {sides[0]['error']} | | | | | | | |\n")
            continue
        rates = ("pairs_per_s", "pairs_per_s_best_turn")
        reference = [side.get("reference_pairs_per_s", float("inf")) for side in sides]
        epoch = [1 / (1 / side["pairs_per_s"] + 1 / rate) for side, rate in zip(sides, reference, strict=True)]
        cells = [
            *(listed(values, 1) for values in (epoch, *([side[key] for side in sides] for key in rates))),
            listed(side["gpu_busy_share"] for side in sides),
            ", ".join(f"{side['tflop_per_s']:.0f}" for side in sides),
            *(span([side[key] for side in sides], 1) for key in ("peak_gb", "reserved_gb")),
            ", ".join(f"{side['warm_up_seconds']:.0f}" for side in sides),
        ]
        rows.append(f"| {words} | {' | '.join(cells)} |\n")
    rate = ", ".join(str(host["matrix_tflop_per_s"]) for host in hosts)
    return f"""
| side | pairs a second, one epoch | steps alone | fastest turn | busy | TFLOP/s of {rate} | peak GB | held GB | seconds of the first six steps |
|---|---|---|---|---|---|---|---|---|
{"".join(rows)}"""


def gpu_long() -> str:
    """Long prompts: each prompt once, and two rows a pair."""
    sides = result("gpu_expert")["hosts"][0]["long"]["sides"]
    one, two = sides["long"], sides["long_two_rows"]
    rows = [
        f"| {words} | {side['pairs_per_s']:.2f} | {side['peak_gb']:.1f} | {side['gpu_busy_share']:.2f} |\n"
        for words, side in (("**each prompt once**, as `train_dpo` does it", one), ("two rows a pair", two))
    ]
    times = f"| the first as times the second | {one['pairs_per_s'] / two['pairs_per_s']:.2f} | {one['peak_gb'] / two['peak_gb']:.2f} | |\n"
    return f"""
| one pair at a time, two in a step, with checkpointing | pairs a second | peak GB | busy |
|---|---|---|---|
{"".join(rows)}{times}"""


def gpu_sides() -> str:
    gpu = result("gpu")
    rows = []
    for name, words in SIDES.items():
        side, times = gpu["sides"][name], gpu["against_usual"][name].get("times_usual")
        estimate = None if name in NOT_ESTIMATED else side["estimated_gb"]
        cells = (side["pairs_per_s"], side["peak_gb"], estimate, side["gpu_busy_share"], times)
        rows.append(" | ".join([f"| {words}", *("" if cell is None else f"{cell:.2f}" for cell in cells)]) + " |\n")
    return f"""
| setting | pairs a second | peak GB | estimated | busy | times the usual |
|---|---|---|---|---|---|
{"".join(rows)}"""


def gpu_ways() -> str:
    """The usual notebook and the two ways of `train_dpo`, side by side."""
    gpu = result("gpu")
    usual, ours, kept = (gpu["sides"][name] for name in ("usual", "ours", "kept"))
    rate = usual["pairs_per_s"]
    others, before = gpu["same_card_other_hosts"], gpu["before_weights_were_cast_once"]
    more = before[0]["kernels_a_step"]["ours"] - ours["kernels_a_step"]

    def once(name: str) -> str:
        return f"{with_reference(name):.2f} ({with_reference(name) / rate:.2f})"

    def never_waiting(side: dict) -> str:
        return f"{side['pairs_per_s'] / side['gpu_busy_share'] / rate:.1f}"

    def waits(side: dict) -> str:
        return f"{1 - side['gpu_busy_share']:.0%}"

    def hosts(some: list[dict], key: str) -> list[float]:
        return [host[key] for host in some]

    return f"""
| | usual | `train_dpo`, memory short | `train_dpo`, with room |
|---|---|---|---|
| pairs a second | {rate:.2f} | {ours["pairs_per_s"]:.2f} | {kept["pairs_per_s"]:.2f} |
| the same with the pass for the cached log-probs, if each pair is trained on once (times the usual) | {rate:.2f} | {once("ours")} | {once("kept")} |
| kernels a step | {usual["kernels_a_step"]:,} | {ours["kernels_a_step"]:,} | {kept["kernels_a_step"]:,} |
| share of a step that the GPU waits for the CPU | {waits(usual)} | {waits(ours)} | {waits(kept)} |
| times the usual's rate if the GPU never waited | | {never_waiting(ours)} | {never_waiting(kept)} |
| TFLOP/s, a prompt that is computed once counted once; large bf16 products reach {gpu["matrix_tflop_per_s"]} | {usual["tflop_per_s"]:.0f} | {ours["tflop_per_s"]:.0f} | {kept["tflop_per_s"]:.0f} |
| three other hosts with the same card: pairs a second, then times that | {listed(hosts(others, "usual"))} | {listed(hosts(others, "ours_times_usual"))} | {listed(hosts(others, "kept_times_usual"))} |
| five hosts, before LoRA's weights were cast once a batch ({more:,} kernels a step more), times the usual | | {span(hosts(before, "ours_times_usual"))} | {span(hosts(before, "kept_times_usual"))} |
"""


def gpu_figures() -> str:
    gpu, sweep = result("gpu"), result("sweep_gpu")
    sides, against = gpu["sides"], gpu["against_usual"]
    estimates = [one["estimated_gb"] / one["peak_gb"] for name, one in sides.items() if name not in NOT_ESTIMATED]
    waiting = [one for one in sides.values() if one["gpu_busy_share"] < 0.8]
    kernel = [8e6 / one["pairs_per_s"] / one["kernels_a_step"] for one in waiting]  # a step has 8 pairs
    hosts = gpu["same_card_other_hosts"] + gpu["before_weights_were_cast_once"]
    offloaded = [host["offloaded_times_usual"] for host in hosts if host["offloaded_times_usual"]]
    sampling = next(one["generation_tokens_per_s"] for one in sides.values() if "generation_tokens_per_s" in one)
    furthest = max(one.get("max_loss_difference", 0) for one in against.values())
    return f"""
| also measured | |
|---|---|
| memory estimate against the measured peak | {span(estimates)} |
| microseconds a kernel, for the settings whose GPU waits | {span(kernel, 0)} |
| times the usual with layer inputs in the machine's memory, on all hosts and at older states of the code | {span([against["offloaded"]["times_usual"], *offloaded])} |
| largest difference to the usual's loss, at any step of any setting | {furthest:.3f} |
| loss at step 0 with a cached reference and two rows a pair, with and without checkpointing | {listed([against[name]["step_0_loss"] for name in ("two_rows", "two_rows_kept")], 3)} |
| loss at step 0 with one forward for both answers | {against["ours"]["step_0_loss"]:.4f} |
| sampling, twenty replies at a time | {sampling:.0f} tokens a second |
| five betas in one sweep, {sweep["pairs"] // 8} steps each, against five plain runs (`python benchmarks/sweep.py --pairs 80 --model FOLDER`) | {sweep["wall_ratio"]:.2f} of the time, {sweep["peak_ratio"]:.2f} times the memory; {sweep["floor_seconds"]:.0f} of its {sweep["sweep_seconds"]:.0f} s are forward and backward passes |
"""


def measured() -> str:
    seeds, train, profile, sweep = map(result, ("seeds", "train", "profile_step", "sweep"))
    accuracies = [
        f"{run['accuracy']:.3f} ({' to '.join(map('{:.2f}'.format, run['accuracy_interval']))})"
        for run in seeds["seeds"]
    ]
    low, high = seeds["seeds"][0]["reference_accuracy_interval"]
    small, large = result("prepare")["sizes"]
    share = {name: f"{value:.0%}" for name, value in profile["share"].items()}
    memory = [case["estimated_gb"] / case["measured_gb"] for case in result("memory")["cases"]]
    by = {column: by_beta(column) for column in ("log_ratio_gap", "kl", "accuracy")}
    gap, kl = (", ".join(over_seeds(values, 1) for values in by[name].values()) for name in ("log_ratio_gap", "kl"))
    accuracy = span([mean(values) for values in by["accuracy"].values()])
    thinking, of_seeds = thinking_row(3), result("thinking")
    well = [f"{sum(replies(name, 'well_formed')):.0f}" for name in ("SFT", "both think", "naive")]
    return f"""
| what | result | command |
|---|---|---|
| implicit reward after the training of `03_train`, in 32 bits: share of {seeds["seeds"][0]["pairs"]} pairs, on three topics not trained on, whose chosen has the higher one; three seeds (95% intervals) | {", ".join(accuracies)}; mean {seeds["accuracy_mean"]:.3f} | `python benchmarks/seeds.py` |
| another measure, before training: the chosen is the likelier answer, per token | {seeds["reference_accuracy"]:.2f} ({low:.2f} to {high:.2f}) | the same |
| pairs a second on two cores, training as the usual notebook does it and as `train_dpo` does it, three epochs of 480 pairs, side by side | {train["plain_pairs_per_s"]:.2f} and {train["ours_pairs_per_s"]:.2f}: {train["speedup"]:.2f} times as fast, with {train["peak_ratio"]:.2f} times the memory | `python benchmarks/train.py` |
| do both compute the same? loss of each step, compared | fp32: within {train["max_loss_difference_fp32"]:.6f}; bf16: {train["mean_loss_difference"]:.3f} apart on average, {train["max_loss_difference"]:.2f} at most | the same |
| batches of similar length, against ours | {train["grouped_step_against_ours"]:.2f}: nothing gained on these pairs, so it is left out | the same |
| what bounds a step now | {profile["step_gflop_per_s"]:.0f} of the {profile["matrix_gflop_per_s"]:.0f} GFLOP/s that two large matrices reach; LM head ({share["LM head"]}: product, softmax, the logged entropy) and elementwise work ({share["elementwise and overhead"]}) take more than the layers' products ({share["projections"]}) | `python tools/profile_step.py` |
| work before the first step, file to the first batch without the reference's pass, against tokenising the same texts once in batches | {small["pairs"]:,} pairs: {small["seconds"]:.0f} s, {small["ratio"]:.2f} times; {large["pairs"]:,} pairs: {large["seconds"]:.0f} s, {large["ratio"]:.2f} times, in {large["peak_mb"]:.0f} MB more than the loaded model | `python benchmarks/prepare.py` |
| memory estimate before training against {len(memory)} measured runs | {span(memory)} | `python benchmarks/memory.py` |
| what beta does: six betas, three seeds, 45 steps; mean log-ratio gap and KL on held-out pairs, in nats (95% intervals over the seeds) | at beta {", ".join(map("{:g}".format, by["kl"]))}: gap {gap}; KL {kl}; accuracy by implicit reward {accuracy} at all of them. A higher beta holds the policy nearer to the reference | `python benchmarks/beta.py` (on {result("beta")["info"]["machine"]}) |
| five betas in one sweep against five plain runs, one epoch of {sweep["pairs"]} pairs each, side by side | {sweep["wall_ratio"]:.2f} of the time, {sweep["floor_ratio"]:.2f} times its own forward and backward passes alone, and {sweep["peak_ratio"]:.2f} times the memory | `python benchmarks/sweep.py` |
| thinking pairs whose sides both think at similar length, {of_seeds["seeds"][0]["both think"]["pairs"]} held out, three seeds, by implicit reward (means with 95% intervals over the seeds) | {listed(of_seeds["accuracies"], 3)}; mean {thinking["both"]}. With naive pairs {listed(of_seeds["naive_accuracies"], 3)}; mean {thinking["naive"]}. Right final answers of {thinking["replies"]}: {thinking["before"]} before, {thinking["after"]} after, {sum(replies("naive", "right")):.0f} after naive pairs. Well-formed replies of {thinking["replies"]}: {well[0]} before, {well[1]} after, {well[2]} after naive pairs | `python benchmarks/thinking.py` (on {of_seeds["machine"]}) |
"""


def many_gpus() -> str:
    """One row for each side: so many processes, so many pairs in each."""
    found = result("many_gpus")
    rows = []
    for name, side in found["sides"].items():
        processes, pairs = map(int, name.split("x"))
        peaks = span(side["peak_gb"], 1) if "peak_gb" in side else ""
        scaling, difference = (found[key].get(name, "") for key in ("scaling", "loss_difference"))
        rows.append(f"| {processes} | {pairs} | {side['pairs_per_s']:.1f} | {scaling} | {peaks} | {difference} |\n")
    model = "random weights in the shape of Qwen3-4B, one card a process"
    if "--cpu" in found["command"]:
        model = "a tiny model on CPUs, which shows that all this works and says nothing about speed"
    return f"""
| processes | pairs in each | pairs a second | times one process | peak GB of a card | losses differ from one process's by |
|---|---|---|---|---|---|
{"".join(rows)}
`{found["command"]}` on {found["machine"]}: {model}. The sides take turns after a warm-up.
"""


def several_cards() -> str:
    """The same in words, for the sides of more than one process."""
    found = result("many_gpus")
    parts = []
    for name, times in found["scaling"].items():
        processes, pairs = name.split("x")
        one, many = (found["sides"][side]["pairs_per_s"] for side in (f"1x{pairs}", name))
        parts.append(
            f"with {pairs} pairs a card {one:.1f} on one card and {many:.1f} on {processes} ({times:.2f} times)"
        )
    return f"""
Pairs a second on {found["machine"]}, random weights in the shape of Qwen3-4B: {"; ".join(parts)}.
"""


def precision() -> str:
    """One row for each way of computing the log-probs of one run's held-out pairs."""
    rows = sorted(result("precision")["table"], key=lambda row: -row["share"])
    lines = [
        f"| {row['way']} | {row['gap']:.2f} | {row['share']:.0%} | {row['error_of_a_pair']:.2f} |\n" for row in rows
    ]
    return f"""
| computed in | gap, nats | of the one in 32 bits | off for a pair by |
|---|---|---|---|
{"".join(lines)}"""


def learning_rate() -> str:
    """One row for each rate: gap, KL and accuracy after each number of steps."""
    table = {(row["rate"], row["steps"]): row for row in result("learning_rate")["table"]}
    rates, steps = (sorted(values) for values in map(set, zip(*table, strict=True)))

    def cell(row: dict) -> str:
        digits = {"gap": 2, "kl": 1, "accuracy": 2}
        return "; ".join(with_half(row[name], n) for name, n in digits.items())

    rows = [" | ".join([f"| {rate:.0e}", *(cell(table[rate, step]) for step in steps)]) + " |\n" for rate in rates]
    return f"""
| learning rate | {" | ".join(f"{step} steps" for step in steps)} |
|---|{"---|" * len(steps)}
{"".join(rows)}"""


def how_many() -> str:
    """One row for each number of pairs: what one epoch and three made of them."""
    found = result("how_many")
    lines = []
    for row in sorted(found["table"], key=lambda row: (row["pairs"], row["steps"])):
        figures = {"gap": 2, "kl": 1, "accuracy": 2}
        cells = [with_half(row[name], n) for name, n in figures.items()]
        epochs = round(row["steps"] * 8 / row["pairs"])
        lines.append(f"| {row['pairs']} | {epochs} | {row['steps']} | {' | '.join(cells)} |\n")
    return f"""
| pairs | epochs | steps | gap, nats | KL, nats a reply | held-out accuracy |
|---|---|---|---|---|---|
{"".join(lines)}"""


def losses() -> str:
    """One row for each loss: its three strengths, what each did, and how long a step takes."""
    found = result("losses")
    rows, seconds = loss_runs(found), found["alone"]["step_seconds"]
    lines, columns = [], {"accuracy": 2, "kl": 1, "chosen_per_token": 2, "ended": 2}
    for loss, runs in rows[rows.exchanged == 0].groupby("loss", sort=False):
        means = runs.groupby("strength")[list(columns)].mean()
        cells = [", ".join(f"{value + 0:.{n}f}" for value in means[name].round(n)) for name, n in columns.items()]
        strengths = ", ".join(f"{value:g}" for value in means.index)
        cells = [
            f"`{loss}`, {found['strengths'][loss]} {strengths}",
            *cells,
            f"{seconds[loss] / seconds['sigmoid']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return f"""
| loss and its strengths | accuracy | KL, nats a reply | change of the chosen, nats a token | replies that end | a step takes, times `sigmoid` |
|---|---|---|---|---|---|
{"".join(lines)}
Means of three seeds: `{found["command"]}` on {found["machine"]}, one epoch of 360 pairs. Before training {found["reference"]["ended"]:.2f} of the replies end. Steps: `{found["alone"]["command"]}`, {found["alone"]["machine"]}.
"""


def retained() -> str:
    """One row for each fault: how many runs gave an alarm, and the range of each part's change."""
    found = result("retention")
    names = {"healthy": "healthy, as in 03", "rate": "10 times the rate", "beta": "beta 0.001, 5 times the rate"}
    names |= {"end": "answers cut off, 5 times the rate", "topic": "one topic, 20 epochs, twice the rate"}
    names["template"] = "another chat template"
    lines = []
    for fault, name in names.items():
        parts = [run["parts"] for run in found["runs"] if run["fault"] == fault]
        changes = [[round(one[part]["change"], 2) + 0 for one in parts] for part in found["limits"]]
        cells = [span(some) for some in changes]
        lines.append(f"| {name} | {found['by_fault'][fault]['alarms']} of {len(parts)} | {' | '.join(cells)} |\n")
    limits = " | ".join(f"-{limit:g}" for limit in found["limits"].values())
    return f"""
| runs | alarms | texts, nats a token | own replies, nats a token | their end, nats | instructions | arithmetic | facts |
|---|---|---|---|---|---|---|---|
{"".join(lines)}| limit | | {limits} |

`{found["command"]}` on {found["machine"]}: changes by training, lowest to highest of the runs.
"""


def on_policy() -> str:
    """One row for each arm and round: means over seeds with half of their intervals."""
    found, lines = result("on_policy"), []
    digits = {"right": 3, "sampled_right": 3, "false_steps": 2, "kl": 1, "reply_tokens": 0, "different_answers": 1}
    for row in found["table"]:
        if row["round"] or row["arm"] == "on_policy":
            cells = [with_half(row[name], n) for name, n in digits.items()]
            arm = f"{row['arm']}, round {row['round']}" if row["round"] else "start"
            lines.append(f"| {arm} | {row['seeds']} | {' | '.join(cells)} |\n")
    gap, half = found["on_policy_minus_offline"]
    times = found["times_the_start"]
    return f"""
| after | seeds | right, greedy | right, sampled | false steps, greedy | KL, nats a reply | tokens of a sampled reply | different answers of 8 sampled |
|---|---|---|---|---|---|---|---|
{"".join(lines)}
On-policy minus offline, right greedy answers after the last round: {gap:+.3f} ± {half:.3f} (95 percent, {found["settings"]["seeds"]} seeds); {times["on_policy"]:.1f} and {times["offline"]:.1f} times as many as at the start. `{found["command"]}` on {found["machine"]}.
"""


def public_runs() -> str:
    """One row for each public run, by how far its rate and steps would take it."""

    def cell(value: float | str | None, form: str = "") -> str:
        return "" if value is None else f"{value:{form}}"

    rows = []
    for run in sorted(result("public_runs")["runs"], key=lambda run: run["rate"] * (run["steps"] or math.inf)):
        gap = ""
        if run["margin"] is not None:
            gap = f"{run['margin'] / run['beta']:.2f}" if run["beta"] else f"margin {run['margin']:.2f}, no beta said"
        together = run["steps"] and f"{run['rate'] * run['steps']:.0e}"
        name = f"[{run['name']}]({run['source']})"
        cells = [
            name,
            cell(run["method"]),
            f"{run['rate']:.0e}",
            cell(run["r"]),
            cell(run["alpha"]),
            cell(run["beta"], "g"),
        ]
        cells += [cell(run["steps"]), cell(together), gap, run.get("note", "")]
        rows.append(f"| {' | '.join(cells)} |\n")
    return f"""
| run | trained | rate | r | alpha | beta | steps | rate times steps | gap, nats | |
|---|---|---|---|---|---|---|---|---|---|
{"".join(rows)}"""


def minutes_by_card() -> list[tuple[dict, float, str, str]]:
    """Minutes for 1,000 pairs by card: what gpu.json measured, scaled by the published peak rate of the other cards."""
    sides, cards = result("gpu")["sides"], result("cards")["cards"]
    measured = max(cards, key=lambda card: card["gb"])  # the card of gpu.json
    rows = []
    for card in cards:
        side = (
            "kept" if 1.25 * sides["kept"]["estimated_gb"] <= card["gb"] else "ours"
        )  # with the headroom of train_dpo
        side = side if card["bf16"] else "two_rows"
        pairs_per_s = with_reference(side) * card["tflop_per_s"] / measured["tflop_per_s"]
        kind = "measured" if card is measured else "estimate"
        rows.append((card, 1000 / pairs_per_s / 60, kind, f"{sides[side]['estimated_gb']:.0f} GB"))
    return rows


def minutes() -> str:
    rows = (
        f"| {card['gb']} GB ({card['card']}) | {each:.0f} | {kind} | {memory} |\n"
        for card, each, kind, memory in minutes_by_card()
    )
    return f"""
| card | minutes | | memory needed |
|---|---|---|---|
{"".join(rows)}"""


def minutes_in_words() -> str:
    *others, (largest, fewest, *_) = minutes_by_card()
    by_card = ", ".join(f"{each:.0f} on {card['gb']} GB" for card, each, *_ in others)
    return f"""
1,000 pairs with Qwen3-4B in 4 bits take about {fewest:.0f} minute on a card of {largest["gb"]} GB (measured); by estimate, {by_card} ([which cards](docs/gpu.md#how-long-will-it-take)).
"""


def settings() -> str:
    """One row for each kind of setting; the refused ones with their reasons."""
    lists = Path(__file__).parent.parent / "helpers" / "train" / "settings.yaml"
    table = yaml.safe_load(lists.read_text(encoding="utf-8"))
    kinds = {
        "heeded": "heeded: the cached reference and the shared forward follow it",
        "result": "given to TRL as it is: it changes what a run ends with; the cases measured are below",
        "harmless": "harmless: it changes logs, reports, workers or memory, and no result",
    }
    rows = [f"| {', '.join(f'`{one}`' for one in table[kind].split())} | {what} |" for kind, what in kinds.items()]
    rows += [f"| `{name}` | refused: {reason} |" for name, reason in table["refused"].items()]
    return "\n".join(["\n| setting | what becomes of it |", "|---|---|", *rows, ""])


def equal() -> str:
    """One row for each case that was compared with TRL, one column for each family."""
    found = result("equal")
    families = list(next(iter(found["differences"].values())))
    cells = {
        name: [f"{by[one]:.1e}" if one in by else "" for one in families] for name, by in found["differences"].items()
    }
    rows = [f"| {' | '.join([name, *row])} |" for name, row in cells.items()]
    head = [f"\n| case | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    return "\n".join([*head, *rows, f"\n`{found['command']}`\n"])


def rounding() -> str:
    """One row for each model."""
    rows = [f"| {name} | {share:.0%} |" for name, share in result("settings")["rounding"].items()]
    return "\n".join(["\n| model | share of the tolerance |", "|---|---|", *rows, ""])


TABLES = {
    "README.md": {"minutes": minutes_in_words, "summary": summary, "several-cards": several_cards},
    "docs/gpu.md": {
        "minutes": minutes,
        "gpu-recorded": gpu_recorded,
        "gpu-expert": gpu_expert,
        "gpu-long": gpu_long,
        "gpu-fair": gpu_fair,
        "gpu-sides": gpu_sides,
        "gpu-ways": gpu_ways,
        "gpu-figures": gpu_figures,
        "many-gpus": many_gpus,
    },
    "docs/settings.md": {"settings": settings, "equal": equal, "rounding": rounding},
    "docs/results.md": {
        "measured": measured,
        "precision": precision,
        "learning-rate": learning_rate,
        "how-many": how_many,
        "public-runs": public_runs,
        "losses": losses,
        "retained": retained,
        "on-policy": on_policy,
    },
}


def current(page: str, text: str) -> str:
    """The `text` of a page with all its tables made anew from the results.

    Raises:
        ValueError: `text` lacks one of the tables.
    """
    for name, make in TABLES[page].items():
        begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{page} has no table {name}")
        text = f"{before}{begin}{make()}{end}{after}"
    return text


def main(arguments: list[str]) -> None:
    for page in TABLES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = current(page, old)
        if "--check" not in arguments:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            sys.exit(f"The tables of {page} are not those of benchmarks/results: python tools/tables.py")


if __name__ == "__main__":
    main(sys.argv[1:])

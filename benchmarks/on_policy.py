"""Pairs from the policy's own replies against given pairs: python benchmarks/on_policy.py --processes 6 --out FILE

The start is the SFT model of `04_thinking_pairs`, one for each seed. From it three rounds of DPO go on, each with the
policy of the round before as its reference, by three arms that differ in their pairs alone:

- on_policy: `sample_pairs` takes eight replies of the policy to each of the round's word problems, and a program
  judges them (`score_thought`);
- offline: pairs that `make_thinking_pairs` writes to other problems of the same topics, as many as on_policy got in
  this round, in as many steps;
- length: as on_policy, but the judge pays for form and length, which can be had without a right answer (first seed).

The problems of the rounds are of the two `--topics` of which the start gets some right at all: where all eight replies
are wrong, there is no pair. No word problem is in two of the SFT, a round, and the held-out ones, which are of all five
topics. After the start and each round: right answers to
the held-out problems by topic, greedy; and eight sampled replies to some of them, which show how far the policy moved
from the start (KL, in nats a reply), how many of a prompt's replies and answers differ, and for how many prompts all
are right or all wrong.

The embedded model; a GPU trains and asks it in 16 bits. `--processes` share the six tasks (a seed, or the third arm).
What is finished is kept in `--folder`, so after an interruption the same command goes on. `--quick` is a trial of one
small round; most of its time is the SFT. The last line is one JSON object: for each arm and round the means over seeds,
with half of their 95 percent interval (Student's t).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

os.environ["DPO_PROFILE"] = "cpu"  # before helpers: the same settings on a GPU too
os.environ["UNSLOTH_CPU_BF16"] = "0"  # on a CPU in 32 bits, as on the pages

ARMS = ("on_policy", "offline", "length")
HELD_OUT_TOPICS = ("everyday", "logic")  # of the written pairs, as in 04_thinking_pairs
NEW_TOKENS = 120  # the longest thought of the made pairs needs under 100
STEP = 8  # pairs
QUICK = {"seeds": 1, "rounds": 1, "prompts": 24, "pairs": 16, "held_out": 20, "sampled": 4, "batch": 32}
FIGURES = ("right", "false_steps", "thought_tokens", "well_formed", "cut")
SAMPLED = ("kl", "sampled_right", "different_texts", "different_answers", "all_right", "all_wrong", "reply_tokens")


def problems(args: argparse.Namespace, seed: int) -> tuple[list, list, list[list], list[list]]:
    """Pairs for the SFT, held-out ones (as many of each topic), and for each round those of on_policy and offline."""
    from helpers import load_thinking_pairs, make_thinking_pairs

    written, made = load_thinking_pairs(), make_thinking_pairs(1000)
    lesson = [pair for pair in written if pair["topic"] not in HELD_OUT_TOPICS] + made[:320]
    known, held_out = {pair["prompt"] for pair in made}, []
    others = [pair for pair in make_thinking_pairs(20 * args.held_out, seed=1) if pair["prompt"] not in known]
    topics = sorted({pair["topic"] for pair in others})
    for topic in topics:
        held_out += [pair for pair in others if pair["topic"] == topic][: args.held_out // len(topics)]
    known |= {pair["prompt"] for pair in held_out}
    each = args.prompts + args.pairs
    fresh = make_thinking_pairs(5 * args.rounds * each, seed=100 + seed)
    fresh = [pair for pair in fresh if pair["prompt"] not in known and pair["topic"] in args.topics]
    if len(fresh) < args.rounds * each:
        raise SystemExit(f"{len(fresh)} problems of {args.topics} are too few for the rounds.")
    rounds = [fresh[i * each : (i + 1) * each] for i in range(args.rounds)]
    return (
        lesson,
        held_out,
        [one[: args.prompts] for one in rounds],
        [one[args.prompts :] for one in rounds],
    )


def measure(policy, start: dict, held_out: list[dict], args: argparse.Namespace) -> dict:
    """What the policy answers, and how far it is from the `start` (its adapter's weights)."""
    from helpers import Dataset, generate_replies, pair_logps, split_thinking, thought_table
    from helpers.data.render import prompt_ids
    from helpers.thinking.score import is_right

    model, tokenizer = policy.model, policy.tokenizer
    room = {"max_new_tokens": NEW_TOKENS, "batch_size": args.batch}
    replies = generate_replies(model, tokenizer, [pair["prompt"] for pair in held_out], **room)
    table = thought_table(replies, [pair["answer"] for pair in held_out], tokenizer)
    table["topic"] = [pair["topic"] for pair in held_out]
    found = table[list(FIGURES)].mean().to_dict() | {"n": len(table), "right_count": int(table.right.sum())}
    found["by_topic"] = table.groupby("topic").right.sum().astype(int).to_dict()
    found["of_topic"] = table.groupby("topic").right.size().to_dict()

    some = held_out[:: len(held_out) // args.sampled][: args.sampled]  # of all topics, which are sorted
    several = [pair for pair in some for _ in range(args.replies)]
    questions = [pair["prompt"] for pair in several]
    sampled = generate_replies(model, tokenizer, questions, temperature=1.0, seed=1, **room)
    answers = [split_thinking(one.ids, tokenizer).answer for one in sampled]
    right = [is_right(answer, pair["answer"]) for answer, pair in zip(answers, several, strict=True)]
    groups = [slice(i, i + args.replies) for i in range(0, len(sampled), args.replies)]
    ids = {"prompt_ids": prompt_ids(tokenizer, questions)[::2]}
    ids |= {side: [one.ids for one in sampled[i::2]] for i, side in enumerate(("chosen_ids", "rejected_ids"))}

    def log_probs():
        logps = pair_logps(model, tokenizer, Dataset.from_dict(ids), batch_size=16)
        return (logps.chosen + logps.rejected) / 2

    now, weights = log_probs(), policy.weights()
    policy.put_back(start)
    ratios = (now - log_probs()).reshape(len(some), -1).mean(dim=1)
    policy.put_back(weights)
    return found | {
        "kl": float(ratios.mean()),
        "kl_error": float(ratios.std() / math.sqrt(len(some))),
        "sampled_right": mean(right),
        "different_texts": mean(len({one.text for one in sampled[group]}) for group in groups),
        "different_answers": mean(len(set(answers[group])) for group in groups),
        "all_right": mean(all(right[group]) for group in groups),
        "all_wrong": mean(not any(right[group]) for group in groups),
        "reply_tokens": mean(len(one.ids) for one in sampled),
        "example": sampled[0].text,
    }


def run_task(task: dict, args: argparse.Namespace) -> None:
    """All rounds of some arms of a seed; what is finished is loaded."""
    from helpers import add_lora, load_model, render_thinking, train_sft  # isort: skip  (first: it imports Unsloth)
    from filelock import FileLock
    from safetensors.torch import load_file, save_file

    from helpers.common import write_atomic, write_json
    from helpers.model.policy import Policy

    seed, folder = task["seed"], args.folder / f"seed-{task['seed']}"
    folder.mkdir(parents=True, exist_ok=True)
    lesson, held_out, *rounds = problems(args, seed)
    model, tokenizer = load_model("embedded")
    policy = Policy(add_lora(model, seed=seed), tokenizer)
    file = folder / "start.safetensors"
    with FileLock(folder / "start.lock"):  # the arms of a seed share it
        if not file.is_file():
            train_sft(policy.model, tokenizer, render_thinking(lesson, tokenizer), learning_rate=1e-3, seed=seed)
            write_atomic(file, lambda path: save_file(policy.weights(), path))
    start = load_file(file)
    for arm in task["arms"]:
        policy.put_back(start)
        if arm == "on_policy" and not (folder / "start.json").is_file():
            write_json(folder / "start.json", measure(policy, start, held_out, args))
        run_arm(policy, arm, start, held_out, rounds, folder, seed, args)


def run_arm(policy, arm: str, start: dict, held_out: list, rounds: list, folder: Path, seed: int, args) -> None:
    """The rounds of one arm, from the start on."""
    from helpers import render_thinking
    from helpers.common import write_json

    asked, given = rounds
    test = render_thinking(held_out[:: len(held_out) // min(40, len(held_out))], policy.tokenizer)
    for number in range(args.rounds):
        began, name = time.monotonic(), f"{arm}-{number + 1}"
        if arm == "offline":
            as_many = json.loads((folder / f"on_policy-{number + 1}.json").read_text(encoding="utf-8"))["pairs"]
            pairs, sampled = render_thinking(given[number][:as_many], policy.tokenizer), {}
        else:
            pairs, sampled = sample(policy, asked[number], folder / f"{name}-replies", seed * 10 + number, arm, args)
        row = {"pairs": len(pairs), "sampled": sampled, "sampling_seconds": time.monotonic() - began}
        run = train(policy, pairs, test, folder / name, seed * 10 + number, args)
        if not (folder / f"{name}.json").is_file():
            row |= {"steps": run.info.steps, "train": run.metrics, **measure(policy, start, held_out, args)}
            write_json(folder / f"{name}.json", row | {"seconds": time.monotonic() - began})


def sample(policy, asked: list[dict], folder: Path, seed: int, arm: str, args: argparse.Namespace) -> tuple:
    """Pairs of a round, and what was sampled for them."""
    from helpers import sample_pairs, score_thought

    def right_thoughts(row: dict, replies: list[str]) -> list[float]:
        return [score_thought(reply, row["answer"], policy.tokenizer) for reply in replies]

    def form_and_length(row: dict, replies: list[str]) -> list[float]:
        """What a judge may fall for that does not calculate: a thought in its tags, and many words."""
        return [("<think>" in reply and "</think>" in reply) + len(reply.split()) / 100 for reply in replies]

    prompts = [{name: pair[name] for name in ("prompt", "answer", "topic")} for pair in asked]
    settings = {"replies": args.replies, "temperature": args.temperature, "max_new_tokens": NEW_TOKENS, "seed": seed}
    judge = form_and_length if arm == "length" else right_thoughts
    pairs = sample_pairs(policy.model, policy.tokenizer, prompts, judge, folder, batch_size=args.batch, **settings)
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("replies-*.jsonl"))]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    scores = [[one["score"] for one in row] for row in rows]
    found = {"prompts": len(rows), "pairs": len(pairs), "different_texts": mean(map(len, rows))}
    if arm != "length":
        of_replies = [sum(one["count"] * (one["score"] > 0) for one in row) for row in rows]
        found |= {"right": mean(of_replies) / args.replies, "all_right": mean(min(one) > 0 for one in scores)}
        found |= {"all_wrong": mean(max(one) == 0 for one in scores)}
        # At most so many; a right answer above a false step only if there are not enough others.
        pairs = pairs.select(sorted(range(len(pairs)), key=lambda i: -pairs[i]["score_chosen"]))
    return pairs.select(range(min(args.pairs, len(pairs)))), found


def train(policy, pairs, test, folder: Path, seed: int, args: argparse.Namespace):
    """A round of `train_dpo`."""
    from helpers import train_dpo

    settings = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "logging_steps": 5}
    settings |= {"per_device_train_batch_size": STEP, "gradient_accumulation_steps": 1}
    settings |= {"max_steps": math.ceil(args.pairs / STEP), "learning_rate": args.rate, "beta": args.beta, "seed": seed}
    if args.sft_weight:
        settings |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, args.sft_weight]}
    return train_dpo(policy.model, policy.tokenizer, pairs, test, folder, **settings)


def summary(folder: Path, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """(a line for each arm and round, a row for each arm, round and seed)."""
    from helpers import seed_interval, wilson_interval

    rows = []
    for seed in range(args.seeds):
        for arm in ARMS if seed == 0 else ARMS[:2]:
            files = ["start.json"] + [f"{arm}-{number + 1}.json" for number in range(args.rounds)]
            for number, name in enumerate(files):
                found = json.loads((folder / f"seed-{seed}" / name).read_text(encoding="utf-8"))
                rows.append({"arm": arm, "round": number, "seed": seed} | found)
    table = []
    for arm in ARMS:
        for number in range(args.rounds + 1):
            some = [row for row in rows if (row["arm"], row["round"]) == (arm, number)]
            line = {"arm": arm, "round": number, "seeds": len(some)}
            for name in FIGURES + SAMPLED:
                values = [row[name] for row in some]
                half = seed_interval(values) if len(values) > 1 else None
                line[name] = [round(mean(values), 4), half and round(half, 4)]
            counts = [sum(row[name] for row in some) for name in ("right_count", "n")]
            line["right_pooled"] = [*counts, *(round(end, 4) for end in wilson_interval(*counts))]
            line["by_topic"] = {
                topic: [sum(row[name][topic] for row in some) for name in ("by_topic", "of_topic")]
                for topic in some[0]["by_topic"]
            }
            table.append(line)
    return table, rows


def compared(rows: list[dict], last: int) -> dict:
    """On-policy minus offline after the last round, and how many times as many right answers as at the start."""
    from helpers import seed_interval

    right = {(row["arm"], row["round"], row["seed"]): row["right"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    gaps = [right["on_policy", last, seed] - right["offline", last, seed] for seed in seeds]
    before = sum(right["on_policy", 0, seed] for seed in seeds)
    return {
        "on_policy_minus_offline": [mean(gaps), seed_interval(gaps) if len(gaps) > 1 else None],
        "times_the_start": {
            arm: sum(right[arm, last, seed] for seed in seeds) / before if before else None for arm in ARMS[:2]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=600, help="word problems that are sampled in a round")
    parser.add_argument("--replies", type=int, default=8, help="to each, an even number")
    parser.add_argument("--pairs", type=int, default=200, help="of a round, at most")
    parser.add_argument("--topics", nargs="+", default=["order", "arithmetic"], help="of the problems of a round")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the replies that are paired")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of DPO")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--sft-weight", type=float, default=1.0, help="of the SFT loss of the chosen side; 0: none")
    parser.add_argument("--held-out", type=int, default=300, help="word problems, of five topics")
    parser.add_argument("--sampled", type=int, default=60, help="of them with sampled replies too")
    parser.add_argument("--batch", type=int, default=512, help="replies at a time; on a CPU 32 are enough")
    parser.add_argument("--processes", type=int, default=1, help="that share the runs on one machine")
    parser.add_argument("--folder", type=Path, default=Path("outputs/on_policy"), help="of the runs; it is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--quick", action="store_true", help=f"a trial: {QUICK}")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    tasks = [{"seed": seed, "arms": ARMS[:2]} for seed in range(args.seeds)] + [{"seed": 0, "arms": ARMS[2:]}]
    if args.share is not None:
        for task in tasks[args.share :: args.processes]:
            run_task(task, args)
        return
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "out", "share", "quick")}
    same = {name: value for name, value in settings.items() if name not in ("seeds", "processes")}
    args.folder.mkdir(parents=True, exist_ok=True)
    kept = args.folder / "settings.json"
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != same:
        raise SystemExit(f"{args.folder} holds runs with other settings; take another --folder.")
    kept.write_text(json.dumps(same), encoding="utf-8")
    began, command = time.monotonic(), [sys.executable, *sys.argv, "--share"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes))}
    shares = range(min(args.processes, len(tasks)))
    workers = [subprocess.Popen([*command, str(share)], env=os.environ | threads) for share in shares]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("A process failed; what it said is above. The same command goes on.")
    from helpers import machine, versions
    from helpers.common import write_json

    table, rows = summary(args.folder, args)
    shown = {name: " ".join(value) if name == "topics" else value for name, value in settings.items()}
    shown = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in shown.items())
    result = {"command": f"python benchmarks/on_policy.py {shown}", "settings": settings, "machine": machine()}
    result |= {"versions": versions(), "seconds": time.monotonic() - began, **compared(rows, args.rounds)}
    result["table"] = table
    if args.out:
        write_json(args.out, result | {"runs": rows})
    print(json.dumps(result))


if __name__ == "__main__":
    main()

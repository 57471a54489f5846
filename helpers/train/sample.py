"""Pairs from the policy's own replies: `sample_pairs` samples them, asks a judge, and pairs the best with the worst."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from helpers.common import UserError, why_not_written, write_atomic
from helpers.data.check import check_pairs
from helpers.data.load import load_pairs
from helpers.data.render import Prompt, reply_opening, turns_of
from helpers.model import Model, Prompts, Tokenizer
from helpers.model.fingerprint import config_hash, fingerprint, tokenizer_hash
from helpers.model.generate import Reply, generate_replies
from helpers.train import say

ReplyJudge = Callable[[Prompt, list[str]], Sequence[float]]
ROW_KEEPS = ("topic", "answer", "tools", "chat_template_kwargs")  # of a row that is a prompt


def best_and_worst(replies: list[dict[str, Any]], prompt: str = "") -> tuple[dict, dict] | None:
    """The two of the `replies` (text, score, ended) to pair, or None if none is better than another. The chosen one is
    whole: one that was cut would teach to end there. Of equal ones a hash with `prompt` takes one, not their order."""

    def drawn(among: list[dict[str, Any]], best: Callable) -> dict[str, Any]:
        equal = [one for one in among if one["score"] == best(other["score"] for other in among)]
        return min(equal, key=lambda one: hashlib.sha256(f"{prompt}\n{one['text']}".encode()).digest())

    written = [one for one in replies if one["text"].strip()]
    if not (whole := [one for one in written if one["ended"]]):
        return None
    pair = drawn(whole, max), drawn(written, min)
    return pair if pair[0]["score"] > pair[1]["score"] else None


def _write(path: Path, rows: list) -> None:
    """Write `rows` to `path`, each as a line of JSON; UserError if that can't be done."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(say("replies_not_written", folder=path.parent, reason=why_not_written(error))) from error


def _judged(judge: ReplyJudge, prompt: Prompt, sampled: list[Reply]) -> list[dict[str, Any]]:
    """The different texts among the replies `sampled`, each with its count, its score and whether it ended."""
    counts, whole = Counter(one.text for one in sampled), {one.text for one in sampled if one.ended}
    scores = [float(score) for score in judge(prompt, list(counts))]
    if len(scores) != len(counts) or not all(map(math.isfinite, scores)):
        raise UserError(say("no_scores", replies=len(counts), scores=f"{scores!r:.200}"))
    rows = zip(counts.items(), scores, strict=True)
    return [{"text": text, "count": n, "score": score, "ended": text in whole} for (text, n), score in rows]


def _pairs(prompts: list[Prompt], rows: list[list[dict]], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """A pair for each prompt of which one reply is better than another."""
    opening = reply_opening(tokenizer)
    opened = opening[opening.rfind("<think>") :] if "<think>" in opening and "</think>" not in opening else ""
    for prompt, row in zip(prompts, rows, strict=True):
        if pair := best_and_worst(row, json.dumps(turns := turns_of(prompt))):
            own = prompt if isinstance(prompt, dict) else {}
            pair_row = {"prompt": turns, "different": len(row)} | {
                name: own[name] for name in ROW_KEEPS if own.get(name)
            }
            for side, one in zip(("chosen", "rejected"), pair, strict=True):
                pair_row[side] = [{"role": "assistant", "content": opened + one["text"]}]
                pair_row[f"score_{side}"] = one["score"]
            yield pair_row


def _said(rows: list[list[dict]], tokens: int, seconds: float) -> str:
    """What was sampled, in one line."""
    scores = [{one["score"] for one in row} for row in rows]
    best, worst = max(map(max, scores)), min(map(min, scores))
    equal = Counter(score for one in scores if len(one) == 1 for score in one)
    counts = {"prompts": len(rows), "equal": equal.total(), "all_best": equal[best], "all_worst": equal[worst]}
    return say("sampled", **counts, best=best, worst=worst, tokens=tokens, speed=tokens / seconds)


def sample_pairs(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    judge: ReplyJudge,
    folder: str | Path,
    *,
    max_new_tokens: int,
    replies: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> Dataset:
    """Pairs of what the policy says now: the best of its replies to a prompt against the worst.

    Replies are kept after each batch: after an interruption the same call goes on and gives the same pairs. A prompt
    whose replies are all equally good makes none; a printed line counts these. Replies are untrusted: pairs in which
    `check_pairs` finds an error are left out.

    Args:
        model, tokenizer: the policy, and its tokenizer.
        prompts: questions, conversations, or rows of pairs, whose topic, answer and options of the template are kept.
        judge: a function that gets one of `prompts` and the different texts among its replies, and returns a score for
            each; higher is better. A language model as judge sees them in both orders; if these disagree, it is a tie.
            An edited judge is not noticed: give it another name, or the call another folder.
        folder: gets a file for each batch of replies, in the order of `prompts`, and `pairs.jsonl`.
        replies: how many to each prompt.
        max_new_tokens, temperature, top_p, seed: as in `generate_replies`.
        batch_size: replies at a time; left out, 16 on a CPU and 128 on a GPU.

    Returns:
        Pairs as `load_pairs` gives them, with score_chosen, score_rejected and different (texts among the replies).

    Raises:
        UserError: fewer than two replies, temperature 0, another sampling in the folder, a judge that does not return a
            finite number for each reply, no pair, a folder that cannot be written.
    """
    folder, prompts = Path(folder).expanduser(), list(prompts)
    if replies < 2 or temperature <= 0 or not prompts:
        raise UserError("sample_pairs needs prompts, at least two replies to each, and a temperature above 0.")
    size = batch_size or (16 if model.device.type == "cpu" else 128)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "batch_size": size}
    now: dict[str, Any] = {"model": [fingerprint(model), config_hash(model), tokenizer_hash(tokenizer)], **sampling}
    now |= {"prompts": hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest()[:20], "replies": replies}
    now |= {"seed": seed, "judge": getattr(judge, "__qualname__", type(judge).__name__)}
    file = folder / "sampling.json"
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else now
    if changed := [name for name in now if there.get(name) != now[name]]:
        raise UserError(say("other_replies", folder=folder, changed=" and ".join(changed)))
    _write(file, [now])
    rows, tokens, began, each = [], 0, time.monotonic(), max(1, size // replies)  # `each` batch has so many prompts
    for number, start in enumerate(range(0, len(prompts), each)):
        part, batch = folder / f"replies-{number:05}.jsonl", prompts[start : start + each]
        if not part.is_file():
            several = [prompt for prompt in batch for _ in range(replies)]
            # By a seed of its own a batch does not depend on those before it.
            found = generate_replies(model, tokenizer, several, seed=seed * 10**6 + number, **sampling)
            tokens += sum(len(one.ids) for one in found)
            groups = (found[i : i + replies] for i in range(0, len(found), replies))
            _write(part, [_judged(judge, *one) for one in zip(batch, groups, strict=True)])
        rows += map(json.loads, part.read_text(encoding="utf-8").splitlines())
    print(_said(rows, tokens, time.monotonic() - began), flush=True)
    if not (made := list(_pairs(prompts, rows, tokenizer))):
        raise UserError(say("no_better_reply"))
    _write(folder / "pairs.jsonl", made)
    pairs = load_pairs(folder / "pairs.jsonl")
    report = check_pairs(pairs, tokenizer, 10**6, on_long_prompt="keep")  # train_dpo says what is too long
    if report.errors:
        print(f"{len(pairs) - len(report.clean)} pairs are left out: {', '.join(one.code for one in report.errors)}.")
    return report.clean

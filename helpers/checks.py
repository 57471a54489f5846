"""What is wrong with these pairs for this tokenizer: found in token ids, before a training step is spent.

`check_pairs` measures every pair once (lengths, marks, hashes; a table that datasets caches) and judges the whole
table afterwards. Its findings go into a `Report`, which takes findings of the same type from other rooms too.
"""

import functools
import html
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from datasets import Dataset, Features, Value, concatenate_datasets

from helpers.errors import UserError
from helpers.pairs import load_report, prompt_text, quiet_progress
from helpers.text import visible

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

MAX_PROMPT_LENGTH = 256  # tokens; a longer prompt leaves too little of max_length to the answers

CODE = Path(__file__).read_text("utf-8")  # as it was imported; measures of another version are not taken
BATCH = 500  # rows at a time: enough for the tokenizer's threads, little enough to keep memory flat
WORST = 5  # rows that a finding names
SHOWN = 200  # characters of a text that a report shows

# A feature tells chosen from rejected when guessing by it alone is right this much more (or less) often than a coin,
# and by more than chance does once in a hundred sets of that size.
LEAK = 0.05
LEAK_SIGMAS = 2.6
# Median of chosen / rejected tokens outside of which the lengths differ enough to be learned before anything else.
LENGTH_RATIOS = (0.8, 1.25)

# code: (severity, why it matters, what to do). Errors stop a run, warnings do not.
CATALOGUE: dict[str, tuple[str, str, str]] = {
    "template_refuses": (
        "error",
        "The chat template raises an error for these rows, and so would the trainer.",
        "Bring the rows into the order of turns that the template wants, or leave them out.",
    ),
    "prompt_not_prefix": (
        "error",
        "The prompt's tokens are not the first tokens of prompt + completion. The trainer then cuts where they part, "
        "and the model is trained on a context that it never sees at inference.",
        "Take white space off the beginning of the completion, or use a chat template (or chat_template_kwargs) that "
        "renders the prompt the same way alone and with an answer.",
    ),
    "completion_empty": (
        "error",
        "A side without text teaches to end at once, or to end never.",
        "Write the missing answer, or leave the row out.",
    ),
    "eos_missing": (
        "error",
        "Nothing teaches the model to stop: replies run on until the limit.",
        "Check tokenizer.eos_token (it must be the token that the chat template puts after a turn), or the template.",
    ),
    "eos_doubled": (
        "error",
        "An EOS inside the completion, or two at its end: the model learns to stop early, or to go on after the end.",
        "Take the EOS out of the texts; the chat template writes it.",
    ),
    "bos_doubled": (
        "error",
        "Two beginning-of-text tokens in a row, which the model has not seen in pre-training.",
        "Take the token out of the texts; the chat template writes it.",
    ),
    "special_token_in_text": (
        "error",
        "A control token of this model inside a text is read as control: it ends or opens a turn in mid-text.",
        "Take the token out of the text.",
    ),
    "same_text": (
        "error",
        "Chosen and rejected are the same: the pair has no gradient and counts as a wrong answer in every accuracy.",
        "Leave the row out.",
    ),
    "swapped_labels": (
        "error",
        "The same two answers to the same prompt stand in both orders, so one of the labels is wrong.",
        "Decide which one is right and take out the other.",
    ),
    "no_room": (
        "error",
        "The prompt alone fills max_length: the trainer drops such rows without a word.",
        "Shorten the prompt (on_long_prompt), or raise max_length.",
    ),
    "test_overlap": (
        "error",
        "These prompts are in the test set too, so its accuracy would measure memory.",
        "Split again with split_pairs, or leave the rows out of the training set.",
    ),
    "duplicate_pair": (
        "warning",
        "A pair that stands twice counts twice.",
        "Keep one of them.",
    ),
    "long_prompt": (
        "warning",
        "DPOTrainer has no max_prompt_length any more; long prompts eat the room of the answers.",
        "Nothing, if this is what you want; else raise max_prompt_length, or pass on_long_prompt.",
    ),
    "over_max_length": (
        "warning",
        "The trainer cuts the end of these completions off, their EOS with it.",
        "Raise max_length, shorten the texts, or leave the rows out.",
    ),
    "user_turn_in_completion": (
        "warning",
        "A completion holds turns of the user as well, and the model is trained to write them.",
        "Split the dialogue so that one assistant turn is the completion.",
    ),
    "template_leftover": (
        "warning",
        "Markup of another model's chat template stands in a text and will be learned as text.",
        "Take the markup out.",
    ),
    "not_utf8": (
        "warning",
        "Bytes that were no UTF-8, or UTF-8 that was once read as Latin-1: the model learns the broken characters.",
        "Save the source as UTF-8 and load it again.",
    ),
    "length_ratio": (
        "warning",
        "One side is much longer than the other in most pairs.",
        "Compare answers of like length, or train with a loss that divides by length (sigmoid_norm).",
    ),
    "length_leak": (
        "warning",
        "Length alone tells chosen from rejected, so length may be all that is learned.",
        "Balance it: as many pairs with the shorter answer chosen.",
    ),
    "feature_leak": (
        "warning",
        "One surface feature alone tells chosen from rejected, so it may be all that is learned.",
        "Bring the feature into both sides, or into neither.",
    ),
    "left_out": (
        "warning",
        "These rows of the source are no pairs and were left out when it was read.",
        "Look at them with load_report(pairs); mend the source if they should count.",
    ),
}

# What a single row can show, each as one bit of its marks.
WHAT = {
    "template_refuses": "the chat template refuses the row",
    "prompt_not_prefix": "prompt is no token prefix",
    "completion_empty": "an empty completion",
    "eos_missing": "a completion does not end in EOS",
    "eos_doubled": "more than one EOS in a completion",
    "bos_doubled": "two BOS in a row",
    "special_token_in_text": "a control token in a text",
    "user_turn_in_completion": "user turns in a completion",
    "template_leftover": "chat markup in a text",
    "not_utf8": "text that is no UTF-8",
}
BIT = {code: 1 << place for place, code in enumerate(WHAT)}

LEFTOVER = re.compile(
    r"<\|[a-z_]{1,20}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>"
    r"|(?:^|\n)#{2,3} ?(?:Instruction|Response|Human|Assistant):|\n\n(?:Human|Assistant):"
)
LATIN1_OF_UTF8 = re.compile("Ã[\u0080-\u00bf]|â€|Â[\u00a0-\u00bf]")
THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)

# What one look at a completion tells; the start of the text and its length are measured apart.
FEATURES: dict[str, Callable[[str, str], bool]] = {
    "has a think block": lambda text, answer: "<think>" in text,
    "has a list": lambda text, answer: bool(LIST.search(answer)),
    "has a digit": lambda text, answer: bool(DIGIT.search(answer)),
    "has code": lambda text, answer: "`" in answer,
    "has bold or a heading": lambda text, answer: "**" in answer or answer.startswith("#") or "\n#" in answer,
    "has more than one line": lambda text, answer: "\n" in answer,
    "has a question mark": lambda text, answer: "?" in answer,
    "has an exclamation mark": lambda text, answer: "!" in answer,
    "ends in mid-sentence": lambda text, answer: answer[-1:].isalnum() or answer[-1:] in (",", ";"),
}
LIST = re.compile(r"^\s*(?:[-*\u2022]|\d{1,3}[.)])\s", re.MULTILINE)
DIGIT = re.compile(r"\d")


# Findings and the report


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with some pairs.

    `rows` are positions in the pairs that were checked (from 0), the worst first; `origins` names the worst of them
    for the reader. `what` says it in a few words, `why` says why it matters, `cure` what to do.
    """

    code: str
    severity: Literal["error", "warning"]
    count: int
    what: str
    why: str
    cure: str
    rows: tuple[int, ...] = ()
    origins: tuple[str, ...] = ()


def _rows(finding: Finding) -> str:
    """The worst rows in short: "pairs.jsonl:3, 7, 9, ..."."""
    names: list[str] = []
    before = None
    for origin in finding.origins:
        place = re.fullmatch(r"(.*[: ])(\d+)", origin)
        same = place is not None and place[1] == before
        names.append(place[2] if same else origin)
        before = place[1] if place else None
    return visible(", ".join(names), SHOWN) + (", ..." if finding.count > len(names) > 0 else "")


class Report:
    """The findings of a check. It prints as a short table; `to_frame()` has the reasons and the cures as well.

    `findings`: list of Finding, errors first. `figures`: numbers of the whole set (pairs, median lengths in tokens,
    length ratio, how often the longer side is chosen, accuracy of each feature alone). `lengths`: tokens of each pair
    that remains, as arrays "prompt", "chosen", "rejected". `pairs`: the pairs to train on: long prompts shortened or
    left out as asked. `clean`: the same without the rows of any error.
    """

    def __init__(self, checked: Dataset, pairs: Dataset, kept: np.ndarray, figures: dict, lengths: dict):
        self.findings: list[Finding] = []
        self.pairs, self.figures, self.lengths = pairs, figures, lengths
        self._checked, self._kept = len(checked), kept  # kept: positions in what was checked, shape (len(pairs),)

    def add(self, findings: "Finding | Iterable[Finding]") -> "Report":
        """Take in further findings about the same pairs; returns the report."""
        self.findings += [findings] if isinstance(findings, Finding) else list(findings)
        self.findings.sort(key=lambda finding: finding.severity)  # stable; "error" comes before "warning"
        return self

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop a run."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def clean(self) -> Dataset:
        """`pairs` without the rows of any error."""
        bad = {row for finding in self.errors for row in finding.rows}
        return self.pairs.select([place for place, row in enumerate(self._kept) if int(row) not in bad])

    def raise_for_errors(self) -> None:
        """Raise UserError where the report holds an error; it names the rows, the cures and how to go on anyway."""
        if not self.errors:
            return
        lines = [
            f"- {visible(error.what, SHOWN)}: {error.count} ({_rows(error)}). {error.cure}" for error in self.errors
        ]
        raise UserError(
            "These pairs have errors that would spoil training:\n"
            + "\n".join(lines)
            + "\nMend the data, or go on with "
            "check_pairs(...).clean in its place, which leaves the rows with errors out "
            f"({len(self.clean)} of {self._checked} pairs remain)."
        )

    def to_frame(self) -> "pd.DataFrame":
        """One row for each finding: severity, code, count, what, rows (the worst), why, cure."""
        import pandas as pd

        rows = [(f.severity, f.code, f.count, visible(f.what, SHOWN), _rows(f), f.why, f.cure) for f in self.findings]
        return pd.DataFrame(rows, columns=["severity", "code", "count", "what", "rows", "why", "cure"])

    def _summary(self) -> str:
        errors = len(self.errors)
        warnings = len(self.findings) - errors
        found = f"{errors} kinds of error, {warnings} of warning" if self.findings else "nothing found"
        return f"{self._checked} pairs checked: {found}."

    def __str__(self) -> str:
        lines = [self._summary()]
        for f in self.findings:
            rows = _rows(f)
            lines.append(
                f"{f.severity:8}{f.count:>7}  {f.code:24}{visible(f.what, SHOWN)}" + (f" ({rows})" if rows else "")
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        if not len(frame):
            return f"<p>{self._summary()}</p>"
        cells = [[html.escape(str(value)) for value in row] for row in frame.itertuples(index=False)]
        head = "".join(f"<th>{name}</th>" for name in frame.columns)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        return f"<p>{self._summary()}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# Measuring: one pass over the pairs


def _cuts_cleanly(token: Any, others: Iterable[str]) -> bool:
    """True where tokenizing a text in two parts, the second of which begins with this token, must give the same ids.

    A fast tokenizer takes its added tokens out of the raw text first (the leftmost, longest match), then normalizes,
    splits and merges what lies between them piece by piece, so no merge crosses an added token. A cut before one
    could still be felt if the match took in white space, depended on the neighbours or on the normalizer, or if
    another match could begin before the cut and reach over it; these are ruled out here.
    """
    text = token.content
    reaches_over = any(
        text in other[1:] or any(other.endswith(text[:n]) for n in range(1, len(text))) for other in others
    )
    return not (token.lstrip or token.single_word or token.normalized or reaches_over)


class _Measure:
    """Measures a batch of pairs for one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.ids_of: dict[str, list[int]] = {}  # of the few endings that prompts have
        self.blank: dict[int, bool] = {}  # token id -> white space only
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        opening = self.render([probe[:1]], [{}], add_generation_prompt=True)[0] or ""
        whole = self.render([probe], [{}])[0] or ""
        added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
        special = [token for token in added if token.special]
        fast = getattr(tokenizer, "is_fast", False) and not getattr(tokenizer, "split_special_tokens", False)
        contents = [token.content for token in added]
        self.cuts = [token.content for token in special if fast and _cuts_cleanly(token, contents)]
        self.cuts.sort(key=opening.rfind, reverse=True)  # the token that opens the answer is nearly always the one
        self.bos = tokenizer.bos_token
        # Control tokens: those of the chat. Others, as SmolLM2's <filename>, stand in honest texts too.
        control = {token.content for token in special if token.content in whole or "|" in token.content}
        control |= {token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token}
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        # What a text must hold for one of the two patterns to be in it; far faster than asking the patterns.
        self.openers = {token[0] for token in control}

    @staticmethod
    def settings(batch: dict[str, list]) -> list[dict[str, Any]]:
        """What the chat template gets beside the messages, for each row: its tools and its chat_template_kwargs."""
        size = len(batch["prompt"])
        tools = batch["tools"] if "tools" in batch else [None] * size
        kwargs = batch["chat_template_kwargs"] if "chat_template_kwargs" in batch else [None] * size
        tools = [{"tools": json.loads(one) if isinstance(one, str) else one} if one else {} for one in tools]
        return [{**tool, **(one or {})} for tool, one in zip(tools, kwargs, strict=True)]

    def render(self, conversations: list[list[dict]], settings: list[dict], **kwargs: Any) -> list[str | None]:
        """Each conversation through the chat template with its row's settings; None where the template refuses it."""
        apply = functools.partial(self.tokenizer.apply_chat_template, tokenize=False)
        texts: list[str | None] = [None] * len(conversations)
        groups: dict[str, list[int]] = {}
        for row, setting in enumerate(settings):
            groups.setdefault(json.dumps(setting, sort_keys=True) if setting else "", []).append(row)
        for rows in groups.values():
            options = {**settings[rows[0]], **kwargs}
            try:
                rendered = apply([conversations[row] for row in rows], **options)
            except Exception:  # the template's own: it may raise anything, for one row of many
                rendered = []
                for row in rows:
                    try:
                        rendered.append(apply(conversations[row], **options))
                    except Exception:
                        rendered.append(None)
            for row, text in zip(rows, rendered, strict=True):
                texts[row] = text
        return texts

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the trainer gets them from rendered texts: no special tokens added."""
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    def _cut(self, prompt: str, *others: str) -> int:
        """Where the texts may be cut so that the first part is common to all and tokens on both sides stay as they
        are; 0 where no such place is known."""
        for token in self.cuts:
            place = prompt.rfind(token)
            if place > 0 and all(other.startswith(prompt[: place + len(token)]) for other in others):
                return place
        return 0

    def _text_marks(self, text: str) -> int:
        marks = 0
        if any(opener in text for opener in self.openers) and self.control.search(text):
            marks |= BIT["special_token_in_text"]
        elif ("<" in text or "[" in text or "##" in text or "\n\n" in text) and LEFTOVER.search(text):
            marks |= BIT["template_leftover"]
        if not text.isascii() and ("\ufffd" in text or LATIN1_OF_UTF8.search(text)):
            marks |= BIT["not_utf8"]
        return marks

    def _ends_in_eos(self, ids: list[int]) -> bool:
        for token in reversed(ids):
            if token == self.tokenizer.eos_token_id:
                return True
            if token not in self.blank:
                self.blank[token] = not self.tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
            if not self.blank[token]:
                return False
        return False

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Rows of the one form in, columns of MEASURES out (same number of rows)."""
        from trl.data_utils import common_prefix_length

        prompts, sides = batch["prompt"], (batch["chosen"], batch["rejected"])
        size = len(prompts)
        settings = self.settings(batch)
        rendered = [
            self.render(prompts, settings, add_generation_prompt=True),
            *(self.render([a + b for a, b in zip(prompts, side, strict=True)], settings) for side in sides),
        ]
        refused = [None in texts for texts in zip(*rendered, strict=True)]
        rendered = [[text or "" for text in texts] for texts in rendered]
        cuts = [self._cut(*texts) for texts in zip(*rendered, strict=True)]

        # The common first part once, then what follows it in the prompt (a few endings), in chosen and in rejected.
        endings = [text[cut:] for text, cut in zip(rendered[0], cuts, strict=True)]
        if len(self.ids_of) > BATCH:  # without a cut every prompt is an ending of its own
            self.ids_of.clear()
        new = list(dict.fromkeys(ending for ending in endings if ending not in self.ids_of))
        parts = [text[:cut] for text, cut in zip(rendered[0], cuts, strict=True)]
        for texts in rendered[1:]:
            parts += [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        ids = self.encode(parts + new)
        if self.cuts and ids[0] + ids[size] != self.encode([rendered[1][0]])[0]:  # proved above; looked at all the same
            self.cuts = []
            return self(batch)
        self.ids_of.update(zip(new, ids[3 * size :], strict=True))

        result: dict[str, list] = {name: [] for name in MEASURES}
        for row in range(size):
            ending, both = self.ids_of[endings[row]], (ids[size + row], ids[2 * size + row])
            shared = min(common_prefix_length(ending, side) for side in both)
            marks = BIT["prompt_not_prefix"] if shared < len(ending) else 0
            if self.bos and self.bos * 2 in rendered[1][row] + " " + rendered[2][row]:
                marks |= BIT["bos_doubled"]
            for turn in prompts[row]:
                marks |= self._text_marks(turn["content"])
            result["prompt_text"].append(_hash(prompt_text(prompts[row])))
            result["prompt"].append(len(ids[row]) + len(ending))
            result["shared"].append(len(ids[row]) + shared)
            for name, side, tokens in zip(("chosen", "rejected"), sides, both, strict=True):
                turns, completion = side[row], tokens[shared:]
                text = "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
                marks |= self._text_marks(text)
                eos = completion.count(self.tokenizer.eos_token_id)
                marks |= BIT["eos_doubled"] if eos > len(turns) else 0
                marks |= 0 if self._ends_in_eos(completion) else BIT["eos_missing"]
                marks |= 0 if text.strip() else BIT["completion_empty"]
                marks |= BIT["user_turn_in_completion"] if len(turns) > 1 else 0
                answer = (THOUGHT.sub("", text) if "<think>" in text else text).strip()
                result[name].append(len(completion))
                result[f"{name}_characters"].append(len(text))
                result[f"{name}_text"].append(_hash(json.dumps(turns)))
                result[f"{name}_start"].append(_hash(_start(answer)))
                result[f"{name}_features"].append(
                    sum(1 << place for place, test in enumerate(FEATURES.values()) if test(text, answer))
                )
            result["marks"].append(BIT["template_refuses"] if refused[row] else marks)
        return result


_SIDE = ("", "_characters", "_text", "_start", "_features")
MEASURES = Features(
    {
        name: Value("int64" if name.endswith(("_text", "_start")) else "int32")
        for name in (
            "prompt",
            "shared",
            "prompt_text",
            "marks",
            *(f"{s}{m}" for s in ("chosen", "rejected") for m in _SIDE),
        )
    }
)


def _hash(text: str) -> int:
    """64 bits as a signed number."""
    return xxhash.xxh3_64_intdigest(text.encode()) - 2**63


def _start(answer: str) -> str:
    return " ".join(answer[:100].split()[:2]).casefold()


def _table_key(pairs: Dataset, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Names everything that the measures depend on: data, tokenizer, template, and the code that measures."""
    tokenizer("")  # resets padding and truncation, which the tokenizer keeps as part of its state
    fast = getattr(tokenizer, "is_fast", False)
    parts = (
        pairs._fingerprint,
        tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
        sorted(tokenizer.special_tokens_map.items()),
        version("transformers"),
        CODE,
    )
    return xxhash.xxh3_128(repr(parts).encode()).hexdigest()


def _measure(pairs: Dataset, tokenizer: "PreTrainedTokenizerBase") -> dict[str, np.ndarray]:
    """MEASURES as arrays of shape (len(pairs),). Pairs from a file are measured once: datasets keeps the table."""
    with quiet_progress(len(pairs)):
        table = pairs.map(
            _Measure(tokenizer),
            batched=True,
            batch_size=BATCH,
            remove_columns=pairs.column_names,
            features=MEASURES,
            new_fingerprint=_table_key(pairs, tokenizer),
            desc="Checking pairs",
        )
    return {name: table.data.column(name).to_numpy().copy() for name in MEASURES}


# Long prompts


def _later_starts(prompt: list[dict[str, str]]) -> list[int]:
    """Where a shortened prompt may begin: at each user turn but the first."""
    return [place for place, turn in enumerate(prompt) if turn["role"] == "user"][1:]


def _from_turn(prompt: list[dict[str, str]], start: int) -> list[dict[str, str]]:
    return [turn for turn in prompt[:1] if turn["role"] == "system"] + prompt[start:]


def _shortened(pairs: Dataset, rows: np.ndarray, tokenizer: "PreTrainedTokenizerBase", limit: int) -> dict[int, int]:
    """row -> the earliest turn from which its prompt has at most `limit` tokens; rows without such a turn are not in.

    A system turn stays. Turns are dropped whole, from the left.
    """
    measure, starts = _Measure(tokenizer), {}
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        batch = pairs.select(part)[:]
        options = measure.settings(batch)
        tries = [
            (int(row), start, _from_turn(prompt, start), setting)
            for row, prompt, setting in zip(part, batch["prompt"], options, strict=True)
            for start in _later_starts(prompt)
        ]
        if not tries:
            continue
        texts = measure.render([one[2] for one in tries], [one[3] for one in tries], add_generation_prompt=True)
        sizes = map(len, measure.encode([text or "" for text in texts]))
        for (row, start, _, _), size in zip(tries, sizes, strict=True):
            if size <= limit:
                starts.setdefault(row, start)
    return starts


def _mend(pairs: Dataset, starts: dict[int, int], dropped: np.ndarray) -> tuple[Dataset, Dataset | None]:
    """The pairs without the dropped rows and with shortened prompts, in the same order, and the shortened ones."""
    if not starts:
        kept = np.setdiff1d(np.arange(len(pairs)), dropped)
        return (pairs.select(kept) if len(dropped) else pairs), None
    rows = np.array(sorted(starts))
    cut_at = [starts[row] for row in rows.tolist()]
    same = np.setdiff1d(np.arange(len(pairs)), np.concatenate([rows, dropped]))
    with quiet_progress(len(rows)):
        short = pairs.select(rows).map(
            lambda row, place: {"prompt": _from_turn(row["prompt"], cut_at[place])},
            with_indices=True,
            features=pairs.features,
            desc="Shortening prompts",
        )
    order = np.argsort(np.concatenate([same, rows]))
    return concatenate_datasets([pairs.select(same), short]).select(order), short


# Judging


def _mix(*columns: np.ndarray) -> np.ndarray:
    """One 64-bit hash a row from several."""
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _accuracy(chosen: np.ndarray, rejected: np.ndarray) -> tuple[float, bool]:
    """How often "the side with more of it is chosen" is right, ties counted half, and whether that is a leak.

    The spread of a coin's accuracy over n pairs, m of which the feature decides, is sqrt(m) / 2n.
    """
    more, less, size = int((chosen > rejected).sum()), int((chosen < rejected).sum()), len(chosen)
    spread = np.sqrt(more + less) / (2 * size)
    accuracy = 0.5 + (more - less) / (2 * size)
    return accuracy, bool(abs(accuracy - 0.5) > max(LEAK, LEAK_SIGMAS * spread))


def _leading_start(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """The hash of the opening words whose counts on the two sides differ most."""
    starts, place = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
    counts = [np.bincount(part, minlength=len(starts)) for part in (place[: len(chosen)], place[len(chosen) :])]
    return int(starts[np.argmax(np.abs(counts[0] - counts[1]))])


class _Judge:
    """Turns measures into findings; `rows` in its methods are positions in the checked pairs."""

    def __init__(self, pairs: Dataset, measures: dict[str, np.ndarray], live: np.ndarray):
        self.pairs, self.measures, self.live = pairs, measures, np.flatnonzero(live)
        self.findings: list[Finding] = []

    def column(self, name: str) -> np.ndarray:
        return self.measures[name][self.live]

    def find(self, code: str, rows: np.ndarray, what: str, worst: np.ndarray | None = None) -> None:
        """Add a finding about these rows, if there are any; `worst` (one number a checked pair) sorts them."""
        if not len(rows):
            return
        severity, why, cure = CATALOGUE[code]
        if worst is not None:
            rows = rows[np.argsort(-worst[rows], kind="stable")]
        rows = tuple(int(row) for row in rows)
        origins = [f"row {row + 1}" for row in rows[:WORST]]
        if "origin" in self.pairs.column_names:
            origins = self.pairs.select(rows[:WORST])["origin"][:]
        self.findings.append(Finding(code, severity, len(rows), what, why, cure, rows, tuple(origins)))

    def marks(self) -> None:
        marks = self.column("marks")
        for code, what in WHAT.items():
            self.find(code, self.live[marks & BIT[code] > 0], what)

    def repeats(self, test_prompts: np.ndarray | None) -> None:
        prompt, chosen, rejected = (self.column(name) for name in ("prompt_text", "chosen_text", "rejected_text"))
        same = chosen == rejected
        self.find("same_text", self.live[same], "chosen and rejected are the same")
        pair = _mix(prompt, chosen, rejected)
        swapped = np.isin(_mix(prompt, rejected, chosen), pair) & ~same
        self.find("swapped_labels", self.live[swapped], "the same pair with chosen and rejected swapped")
        first = np.zeros(len(pair), dtype=bool)
        first[np.unique(pair, return_index=True)[1]] = True
        self.find("duplicate_pair", self.live[~first], "a pair that was there before")
        if test_prompts is not None:
            self.find("test_overlap", self.live[np.isin(prompt, test_prompts)], "a prompt that is in the test set")

    def lengths(self, max_length: int) -> None:
        shared, longest = self.measures["shared"], np.maximum(self.measures["chosen"], self.measures["rejected"])
        prompt_fills = self.column("shared") >= max_length
        self.find("no_room", self.live[prompt_fills], f"a prompt that fills all {max_length} tokens", shared)
        over = self.live[~prompt_fills & (self.column("shared") + longest[self.live] > max_length)]
        lost = {name: np.maximum(shared + self.measures[name] - max_length, 0) for name in ("chosen", "rejected")}
        cut = int(sum(tokens[over].sum() for tokens in lost.values()))
        total = int(self.column("chosen").sum() + self.column("rejected").sum())
        what = f"pairs over {max_length} tokens; {cut} of {total} completion tokens would be cut"
        self.find("over_max_length", over, what, lost["chosen"] + lost["rejected"])

    def leaks(self) -> dict[str, Any]:
        """Findings of what tells the sides apart; returns the figures."""
        chosen, rejected = self.column("chosen"), self.column("rejected")
        ratio = float(np.median(chosen / np.maximum(rejected, 1)))
        far = np.zeros(len(self.pairs))
        far[self.live] = np.abs(np.log(np.maximum(chosen, 1) / np.maximum(rejected, 1)))
        if not LENGTH_RATIOS[0] <= ratio <= LENGTH_RATIOS[1]:
            side = self.live[(chosen > rejected) if ratio > 1 else (chosen < rejected)]
            self.find("length_ratio", side, f"median length of chosen / rejected is {ratio:.2f}", far)
        longer, leak = _accuracy(chosen, rejected)
        if leak:
            side = self.live[(chosen > rejected) if longer > 0.5 else (chosen < rejected)]
            self.find("length_leak", side, f"the longer side is chosen in {longer:.0%}", far)

        features: dict[str, float] = {}
        bits = self.column("chosen_features"), self.column("rejected_features")
        for place, name in enumerate(FEATURES):
            features[name] = self._feature(name, *(side >> place & 1 for side in bits))
        starts = self.column("chosen_start"), self.column("rejected_start")
        words = _leading_start(*starts)
        where = np.flatnonzero((starts[0] == words) | (starts[1] == words))[0]
        side = "chosen" if starts[0][where] == words else "rejected"
        text = "\n".join(
            turn["content"] for turn in self.pairs[int(self.live[where])][side] if turn["role"] == "assistant"
        )
        phrase = _start(THOUGHT.sub("", text).strip())
        features["starts alike"] = self._feature(f'starts with "{phrase}"', *(side == words for side in starts))
        return {
            "pairs": len(self.live),
            **{f"{name}_tokens": float(np.median(self.column(name))) for name in ("prompt", "chosen", "rejected")},
            "length_ratio": ratio,
            "longer_is_chosen": longer,
            "longer_is_chosen_characters": _accuracy(
                self.column("chosen_characters"), self.column("rejected_characters")
            )[0],
            "features": features,
        }

    def _feature(self, name: str, chosen: np.ndarray, rejected: np.ndarray) -> float:
        accuracy, leak = _accuracy(chosen, rejected)
        if leak:
            rows = self.live[(chosen > rejected) if accuracy > 0.5 else (chosen < rejected)]
            shares = f"in {chosen.mean():.0%} of chosen, {rejected.mean():.0%} of rejected"
            self.find(
                "feature_leak", rows, f"{name}: {shares}; guessing by it is right in {max(accuracy, 1 - accuracy):.0%}"
            )
        return accuracy

    def left_out(self) -> None:
        loaded = load_report(self.pairs)
        if loaded and loaded.left_out:
            severity, why, cure = CATALOGUE["left_out"]
            reasons = "; ".join(f"{rows['count']} {reason}" for reason, rows in loaded.left_out.items())
            origins = [origin for rows in loaded.left_out.values() for origin in rows["origins"]][:WORST]
            count = loaded.rows - loaded.pairs
            what = f"left out when read: {reasons}"
            self.findings.append(Finding("left_out", severity, count, what, why, cure, (), tuple(origins)))


def check_pairs(
    pairs: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int = 512,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    test: Dataset | None = None,
    on_long_prompt: Literal["shorten", "drop", "keep"] = "shorten",
) -> Report:
    """What is wrong with these pairs for this tokenizer; nothing is trained.

    Every pair is rendered with the chat template and tokenized as TRL's DPOTrainer would do it. Errors are what spoils
    training; `report.raise_for_errors()` stops on them. Warnings are for the reader. Checking pairs from a file a
    second time reads the measures from datasets' cache.

    Args:
        pairs: in the form that `load_pairs` gives.
        tokenizer: of the model that is to be trained, with its chat template.
        max_length: tokens of prompt and completion together that the trainer keeps.
        max_prompt_length: tokens of a prompt, the template's opening of the answer included.
        test: the held-out set, whose prompts must not be among `pairs`.
        on_long_prompt: what becomes of prompts over `max_prompt_length`: "shorten" drops whole turns from the left and
            keeps the system turn (what can't be shortened is left out), "drop" leaves the rows out, "keep" leaves them
            as they are.

    Returns:
        A Report, which prints as a short table. `report.findings`: what was found, errors first; `report.pairs`: the
        pairs to train on; `report.clean`: those without the rows of any error; `report.figures`: lengths and leaks.

    Raises:
        UserError: pairs in another form, a tokenizer without chat template or EOS, or no pair remains.
    """
    for data, name in ((pairs, "pairs"), (test, "test")):
        if data is not None and not (
            isinstance(data, Dataset) and {"prompt", "chosen", "rejected"} <= set(data.features)
        ):
            raise UserError(f"{name} is not in the form that load_pairs gives: pass load_pairs(...).")
        if data is not None and not (len(data) and isinstance(data[0]["prompt"], list)):
            raise UserError(f"{name} is empty, or its prompts are no lists of messages: pass load_pairs(...).")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("The tokenizer has no chat template; set tokenizer.chat_template first.")
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no EOS token; set tokenizer.eos_token first.")
    if on_long_prompt not in ("shorten", "drop", "keep"):
        raise UserError(f"on_long_prompt is 'shorten', 'drop' or 'keep', not {on_long_prompt!r}.")

    measures = _measure(pairs, tokenizer)
    tokens = measures["prompt"].copy()
    long = np.flatnonzero(tokens > max_prompt_length)
    starts = _shortened(pairs, long, tokenizer, max_prompt_length) if on_long_prompt == "shorten" else {}
    dropped = np.setdiff1d(long, list(starts)).astype(int) if on_long_prompt != "keep" else long[:0]
    if len(dropped) == len(pairs):
        raise UserError(
            f"Every prompt has more than {max_prompt_length} tokens and none can be shortened by whole turns: raise "
            'max_prompt_length, or pass on_long_prompt="keep".'
        )
    mended, short = _mend(pairs, starts, dropped)
    if short is not None:
        for name, values in _measure(short, tokenizer).items():
            measures[name][sorted(starts)] = values
    live = np.ones(len(pairs), dtype=bool)
    live[dropped] = False

    judge = _Judge(pairs, measures, live)
    judge.marks()
    judge.repeats(None if test is None else np.array([_hash(prompt_text(prompt)) for prompt in test["prompt"]]))
    judge.find(
        "long_prompt",
        long,
        f"prompts over {max_prompt_length} tokens: {len(starts)} shortened, {len(dropped)} left out, "
        f"{len(long) - len(starts) - len(dropped)} kept",
        tokens,
    )
    judge.lengths(max_length)
    figures = judge.leaks()
    judge.left_out()
    lengths = {name: measures[name][live] for name in ("prompt", "chosen", "rejected")}
    return Report(pairs, mended, np.flatnonzero(live), figures, lengths).add(judge.findings)

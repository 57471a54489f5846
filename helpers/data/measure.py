"""One look at every pair, in its text and in its token ids: lengths, marks of what is wrong, hashes, surface features.

The table of measures has the ids too, so that what is checked here is what is trained. datasets keeps it on disk for
pairs that come from a file.
"""

import functools
import json
import re
import uuid
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import xxhash
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from helpers.data import CODE, dialogues
from helpers.data.findings import WHAT
from helpers.data.messages import prompt_text
from helpers.data.render import BOTH, IDS, Renderer, encode, has_thought, mapped, rows_of
from helpers.patches.dataset_key import dataset_key

HIDDEN = ("tool_calls", "reasoning_content", "tools")  # what a chat template may leave out
BIT = {code: 1 << place for place, code in enumerate((*WHAT, *HIDDEN))}  # each mark of a row is one bit
LEFTOVER = re.compile(
    r"<[|｜][A-Za-z_▁]{1,30}[|｜]>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>|<extra_id_\d>"
    r"|(?:^|\n)#{2,3} ?(?:Instruction|Response|Human|Assistant):|(?:^\s*|\n)(?:(?i:Human|Assistant|Prompter)|USER): ?"
    r"|^\s*(?i:User): |\b(?:ASSISTANT|Assistant|Bot|AI|Response):\s*\Z"
)
# "Answer: 42" is an honest beginning; the other marks are not.
OTHER_MARK = re.compile(
    "|".join(one.answer.pattern for one in dialogues.SPELLINGS if one.name != "question and answer")
)
# Of UTF-8: letters with accents, quotation marks, two letters in Cyrillic, two Chinese characters, the byte-order mark.
LATIN1_OF_UTF8 = re.compile(
    "Ã[\u0080-\u00bf]|â€|Â[\u00a0-\u00bf]|[\u00c2-\u00f4][\u0080-\u009f]|(?:[ÐÑ][\u0080-\u00bf\u2018-\u2122]){2}"
    "|(?:[ä-é][\u0080-\u00bf\u2018-\u2122]{2}){2}|ï»¿"
)
THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
# What one look at a completion tells; the start of the text and its length are measured apart.
FEATURES: dict[str, Callable[[str, str], bool]] = {
    "has a think block": lambda text, answer: "<think>" in text,
    "has a list": lambda text, answer: re.search(r"(?m)^\s*(?:[-*\u2022]|\d{1,3}[.)])\s", answer) is not None,
    "has a digit": lambda text, answer: re.search(r"\d", answer) is not None,
    "has code": lambda text, answer: "`" in answer,
    "has bold or a heading": lambda text, answer: "**" in answer or answer.startswith("#") or "\n#" in answer,
    "has more than one line": lambda text, answer: "\n" in answer,
    "has a question mark": lambda text, answer: "?" in answer,
    "has an exclamation mark": lambda text, answer: "!" in answer,
    "ends in mid-sentence": lambda text, answer: answer[-1:].isalnum() or answer[-1:] in (",", ";"),
}


class Measure:
    """Measures batches of pairs for one tokenizer; prompts of more than `limit` tokens lose turns, if there is one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None):
        self.tokenizer, self.limit, self.renderer = tokenizer, limit, Renderer(tokenizer)
        decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        self._is_blank = functools.cache(lambda token: not decode([token]).strip())
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        whole = self.renderer.text(probe, {}) or ""
        special = [token for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
        # Control tokens: those of the chat. Others, as SmolLM2's <filename>, are in honest texts too.
        control = {token.content for token in special if token.content in whole or "|" in token.content}
        control |= {token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token}
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        # What a text must hold for a control token to be in it; far faster than asking the pattern.
        self.openers = {token[0] for token in control}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Rows of `batch`, columns of pairs, as columns of MEASURES and IDS."""
        rows, measured = rows_of(batch), []
        for row, rendered in zip(rows, self.renderer(rows), strict=True):
            of_given = {"prompt_given": rendered["prompt_tokens"], "prompt_begin": self._begin(row["prompt"], rendered)}
            if begin := of_given["prompt_begin"]:
                row = row | {"prompt": from_turn(row["prompt"], begin)}
                (rendered,) = self.renderer([row])
            measured.append(self._measured(row | rendered) | of_given)
        return {name: [one[name] for one in measured] for name in (*MEASURES, *IDS)}

    def _measured(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with its MEASURES."""
        measures = row | {"prompt": row["prompt_tokens"], "shared": len(row["prompt_ids"])}
        measures["prompt_text"] = text_hash(prompt_text(row["prompt"]))
        answers = ["\n".join(turn["content"] for turn in row[side] if turn["role"] == "assistant") for side in BOTH]
        for side, text in zip(BOTH, answers, strict=True):
            answer = THOUGHT.sub("", text).strip()
            begin = " ".join(answer[:100].split()[:2]).casefold() or "(tool call)" * _calls(row[side])
            measures |= {
                side: len(row[f"{side}_ids"]),
                f"{side}_characters": len(text),
                f"{side}_text": text_hash(json.dumps(row[side])),
                f"{side}_start": begin,
                f"{side}_features": sum(test(text, answer) << n for n, test in enumerate(FEATURES.values())),
            }
        faults = {"template_refuses": True} if row["refused"] else self._faults(row, answers)
        return measures | {"marks": sum(BIT[code] for code, there in faults.items() if there)}

    def _faults(self, row: dict[str, Any], answers: list[str]) -> dict[str, Any]:
        """What a row shows, by code; `answers` are the texts of its two sides."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        texts = [turn["content"] for turn in row["prompt"]] + answers
        control = [any(one in text for one in self.openers) and bool(self.control.search(text)) for text in texts]
        question, firsts = row["prompt"][-1]["content"].strip(), [row[side][0]["content"].strip() for side in BOTH]
        words = [[(turn["content"].split(), turn.get("tool_calls")) for turn in row[side]] for side in BOTH]
        plain, cut_off = not has_thought(row), len(row["prompt_ids"]) < row["prompt_tokens"]
        no_thought = plain and row["asked"].rstrip().endswith("<think>")
        begins = [row[f"{side}_text"].removeprefix(row["asked"]).lstrip() for side in BOTH]
        return {
            "thought_missing": no_thought,
            "prompt_not_prefix": cut_off and not no_thought,
            "prompt_differs": plain
            and not cut_off
            and not all(text.startswith(answer) for text, answer in zip(begins, firsts, strict=True)),
            "completion_empty": not all(
                text.strip() or _calls(row[side]) for side, text in zip(BOTH, answers, strict=True)
            ),
            "eos_missing": any(self._last(row[f"{side}_ids"]) != eos for side in BOTH),
            "eos_doubled": any(row[f"{side}_ids"].count(eos) > len(row[side]) for side in BOTH),
            "bos_doubled": bool(bos) and any(bos * 2 in row[f"{side}_text"] for side in BOTH),
            "special_token_in_text": any(control),
            "template_leftover": any(_has_leftover(text) for text, own in zip(texts, control, strict=True) if not own),
            "user_turn_in_completion": any(len(row[side]) > 1 for side in BOTH),
            "not_utf8": any(not t.isascii() and ("\ufffd" in t or LATIN1_OF_UTF8.search(t)) for t in texts),
            "white_space_only": words[0] == words[1] and row["chosen"] != row["rejected"],
            "prompt_is_answer": bool(question) and question in firsts,
            # Not of one word: "Hello" is rightly answered by "Hello, how are you?"
            "prompt_in_answers": bool(question)
            and not question.isalpha()
            and question not in firsts
            and all(answer.startswith(question) for answer in firsts),
            **{key: self._hides(row, key) for key in HIDDEN},
        }

    def _last(self, ids: list[int]) -> int | None:
        """The last token that is not white space only."""
        eos = self.tokenizer.eos_token_id
        return next((token for token in reversed(ids) if token == eos or not self._is_blank(token)), None)

    def _begin(self, prompt: list[dict], rendered: dict[str, Any]) -> int:
        """The first later turn of a user from which a long prompt fits; 0 if it stays as it is."""
        if self.limit is not None and rendered["prompt_tokens"] > self.limit:
            for begin in [place for place, turn in enumerate(prompt) if turn["role"] == "user"][1:]:
                text = self.renderer.text(from_turn(prompt, begin), rendered["options"], add_generation_prompt=True)
                if len(encode(self.tokenizer, [text or ""])[0]) <= self.limit:
                    return begin
        return 0

    def _hides(self, row: dict[str, Any], key: str) -> bool:
        """Whether a side's text is the same without this part of its messages, or the prompt's without the tools."""
        if key == "tools":
            bare = {name: value for name, value in row["options"].items() if name != key}
            texts = (self.renderer.text(row["prompt"], options) for options in (row["options"], bare))
            return bare != row["options"] and len(set(texts)) == 1
        for side in BOTH:
            talk = row["prompt"] + row[side]
            bare = [{name: value for name, value in turn.items() if name != key} for turn in talk]
            if talk != bare and self.renderer.text(bare, row["options"]) == row[f"{side}_text"]:
                return True
        return False


def from_turn(prompt: list[dict], begin: int) -> list[dict]:
    """The `prompt` from the turn `begin` on; a system turn stays."""
    return [turn for turn in prompt[:begin][:1] if turn["role"] == "system"] + prompt[begin:]


def _calls(side: list[dict[str, Any]]) -> bool:
    """Whether an answer asks for a tool: then it may have no text."""
    return any(turn.get("tool_calls") for turn in side)


def _has_leftover(text: str) -> bool:
    # Asking these is far faster.
    signs = "<" in text or "[" in text or "##" in text or "\n" in text or ":" in text[:12] or ":" in text[-3:]
    return signs and bool(LEFTOVER.search(text) or OTHER_MARK.match(text) or dialogues.read(text))


_SIDE = ("", "_characters", "_text", "_features")
MEASURES = Features(
    {name: Value("int32") for name in ("prompt", "prompt_given", "prompt_begin", "shared", "marks")}
    | {name: Value("int64") for name in ("prompt_text", *(side + one for side in BOTH for one in _SIDE))}
    | {f"{side}_start": Value("string") for side in BOTH}
)


def text_hash(text: str) -> int:
    """64 bits as a signed number."""
    return xxhash.xxh3_64_intdigest(text.encode()) - 2**63


def _table_key(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> str:
    """Names everything that the measures depend on: data, tokenizer, template, limit, and the code that measures."""
    of_pairs = dataset_key(pairs)
    if of_pairs is None:  # in memory: nothing is kept, so any name will do
        return uuid.uuid4().hex
    tokenizer("")  # resets padding and truncation, which the tokenizer keeps as part of its state
    fast = getattr(tokenizer, "is_fast", False)
    words = tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items())
    special = sorted(tokenizer.special_tokens_map.items())
    parts = (of_pairs, words, tokenizer.chat_template, special, limit, version("transformers"), CODE)
    return xxhash.xxh3_128(repr(parts).encode()).hexdigest()


def measure_table(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Dataset:
    """The columns of MEASURES and IDS for `pairs`, by `Measure`; datasets keeps the table of pairs from a file."""
    measure, features = Measure(tokenizer, limit), Features({**MEASURES, **IDS})
    return mapped(pairs, measure, features, new_fingerprint=_table_key(pairs, tokenizer, limit), desc="Checking pairs")

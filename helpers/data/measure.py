"""One look at every pair, in its text and in its token ids: lengths, marks of what is wrong, hashes, surface features.

The table of measures has the ids too, so that what is checked here is what is trained. datasets keeps it on disk for
pairs that come from a file.
"""

import json
import re
import uuid
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import xxhash
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from helpers.data import CODE
from helpers.data.messages import prompt_text
from helpers.data.render import BATCH, IDS, Renderer
from helpers.patches.dataset_key import dataset_key
from helpers.session import quiet_progress

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
    "white_space_only": "chosen and rejected differ in white space only",
    "prompt_in_answers": "both answers begin with the prompt",
    "prompt_is_answer": "an answer that is the prompt",
}
BIT = {code: 1 << place for place, code in enumerate(WHAT)}
LEFTOVER = re.compile(
    r"<[|｜][A-Za-z_▁]{1,30}[|｜]>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>|<extra_id_\d>"
    r"|(?:^|\n)#{2,3} ?(?:Instruction|Response|Human|Assistant):|(?:^\s*|\n)(?:Human|Assistant|USER|ASSISTANT): ?"
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


class Measure:
    """Measures batches of pairs for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self._blank: dict[int, bool] = {}  # token id -> white space only
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        whole = self.renderer.texts([probe], [{}])[0] or ""
        special = [token for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
        # Control tokens: those of the chat. Others, as SmolLM2's <filename>, are in honest texts too.
        control = {token.content for token in special if token.content in whole or "|" in token.content}
        control |= {token for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if token}
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        # What a text must hold for one of the two patterns to be in it; far faster than asking the patterns.
        self.openers = {token[0] for token in control}

    def _text_marks(self, text: str) -> int:
        marks = 0
        if any(opener in text for opener in self.openers) and self.control.search(text):
            marks |= BIT["special_token_in_text"]
        elif ("<" in text or "[" in text or "##" in text or "\n" in text or ":" in text[:12]) and LEFTOVER.search(text):
            marks |= BIT["template_leftover"]
        if not text.isascii() and ("\ufffd" in text or LATIN1_OF_UTF8.search(text)):
            marks |= BIT["not_utf8"]
        return marks

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
        return self._blank[token]

    def _side(self, turns: list[dict], ids: list[int]) -> dict[str, int]:
        """What one completion shows, by the ending of its column's name."""
        text = "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
        answer, eos = THOUGHT.sub("", text).strip(), self.tokenizer.eos_token_id
        last = next((token for token in reversed(ids) if token == eos or not self._is_blank(token)), None)
        faults = {
            "eos_doubled": ids.count(eos) > len(turns),
            "eos_missing": last != eos,
            "completion_empty": not text.strip(),
            "user_turn_in_completion": len(turns) > 1,
        }
        return {
            "": len(ids),
            "_characters": len(text),
            "_text": text_hash(json.dumps(turns)),
            "_start": text_hash(first_words(answer)),
            "_features": sum(1 << place for place, test in enumerate(FEATURES.values()) if test(text, answer)),
            "marks": self._text_marks(text) | sum(BIT[code] for code, there in faults.items() if there),
        }

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Rows of `batch`, columns of pairs, as columns of MEASURES and IDS."""
        rendered = self.renderer(batch)
        result: dict[str, list] = {name: [] for name in MEASURES} | {name: rendered[name] for name in IDS}
        bos = self.tokenizer.bos_token
        result |= {"prompt": rendered["prompt_tokens"], "shared": [len(ids) for ids in rendered["prompt_ids"]]}
        for row, prompt in enumerate(batch["prompt"]):
            marks = BIT["prompt_not_prefix"] if result["shared"][row] < result["prompt"][row] else 0
            if bos and bos * 2 in rendered["chosen_text"][row] + " " + rendered["rejected_text"][row]:
                marks |= BIT["bos_doubled"]
            for turn in prompt:
                marks |= self._text_marks(turn["content"])
            marks |= _pair_marks(prompt, batch["chosen"][row], batch["rejected"][row])
            for side in ("chosen", "rejected"):
                found = self._side(batch[side][row], rendered[f"{side}_ids"][row])
                marks |= found.pop("marks")
                for name, value in found.items():
                    result[f"{side}{name}"].append(value)
            result["prompt_text"].append(text_hash(prompt_text(prompt)))
            result["marks"].append(BIT["template_refuses"] if rendered["refused"][row] else marks)
        return result


def _pair_marks(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> int:
    """What the texts of a pair show next to each other."""
    question, answers = prompt[-1]["content"].strip(), [side[0]["content"].strip() for side in (chosen, rejected)]
    words = [[(turn["content"].split(), turn.get("tool_calls")) for turn in side] for side in (chosen, rejected)]
    marks = BIT["white_space_only"] if words[0] == words[1] and chosen != rejected else 0
    if question and question in answers:
        marks |= BIT["prompt_is_answer"]
    elif question and not question.isalpha() and all(answer.startswith(question) for answer in answers):
        marks |= BIT["prompt_in_answers"]  # not of one word: "Hello" is rightly answered by "Hello, how are you?"
    return marks


_SIDE = ("", "_characters", "_text", "_start", "_features")
MEASURES = Features(
    {name: Value("int32") for name in ("prompt", "shared", "marks")}
    | {name: Value("int64") for name in ("prompt_text", *(f"{s}{m}" for s in ("chosen", "rejected") for m in _SIDE))}
)


def text_hash(text: str) -> int:
    """64 bits as a signed number."""
    return xxhash.xxh3_64_intdigest(text.encode()) - 2**63


def first_words(answer: str) -> str:
    """The first two words of `answer`, without regard to case."""
    return " ".join(answer[:100].split()[:2]).casefold()


def _table_key(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """Names everything that the measures depend on: data, tokenizer, template, and the code that measures."""
    of_pairs = dataset_key(pairs)
    if of_pairs is None:  # in memory: nothing is kept, so any name will do
        return uuid.uuid4().hex
    tokenizer("")  # resets padding and truncation, which the tokenizer keeps as part of its state
    fast = getattr(tokenizer, "is_fast", False)
    words = tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items())
    special = sorted(tokenizer.special_tokens_map.items())
    parts = (of_pairs, words, tokenizer.chat_template, special, version("transformers"), CODE)
    return xxhash.xxh3_128(repr(parts).encode()).hexdigest()


def measure_table(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The columns of MEASURES and IDS for `pairs` under `tokenizer`; datasets keeps the table of pairs from a file."""
    with quiet_progress(len(pairs)):
        return pairs.map(
            Measure(tokenizer),
            batched=True,
            batch_size=BATCH,
            remove_columns=pairs.column_names,
            features=Features({**MEASURES, **IDS}),
            new_fingerprint=_table_key(pairs, tokenizer),
            desc="Checking pairs",
        )


def measures_of(table: Dataset) -> dict[str, np.ndarray]:
    """The columns of MEASURES in a `table` of `measure_table` as arrays of shape (pairs,)."""
    columns = table.select_columns(list(MEASURES)).with_format("arrow")[:]
    return {name: columns[name].to_numpy().copy() for name in MEASURES}

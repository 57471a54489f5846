"""What is wrong with these pairs for this tokenizer: found in token ids, before a training step is spent.

`check_pairs` measures every pair once (lengths, marks, hashes; a table that datasets caches) and judges the whole
table afterwards. Its findings go into a `Report`, which takes findings of the same type from other rooms too.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from datasets import Dataset, Features, Value

from helpers.data.messages import prompt_text
from helpers.session import quiet_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURE_CODE = Path(__file__).read_text("utf-8")  # as it was imported; measures of another version are not taken
BATCH = 500  # rows at a time: enough for the tokenizer's threads, little enough to keep memory flat
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


class Measure:
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
            result["prompt_text"].append(text_hash(prompt_text(prompts[row])))
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
                result[f"{name}_text"].append(text_hash(json.dumps(turns)))
                result[f"{name}_start"].append(text_hash(first_words(answer)))
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


def text_hash(text: str) -> int:
    """64 bits as a signed number."""
    return xxhash.xxh3_64_intdigest(text.encode()) - 2**63


def first_words(answer: str) -> str:
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
        MEASURE_CODE,
    )
    return xxhash.xxh3_128(repr(parts).encode()).hexdigest()


def measure_pairs(pairs: Dataset, tokenizer: "PreTrainedTokenizerBase") -> dict[str, np.ndarray]:
    """MEASURES as arrays of shape (len(pairs),). Pairs from a file are measured once: datasets keeps the table."""
    with quiet_progress(len(pairs)):
        table = pairs.map(
            Measure(tokenizer),
            batched=True,
            batch_size=BATCH,
            remove_columns=pairs.column_names,
            features=MEASURES,
            new_fingerprint=_table_key(pairs, tokenizer),
            desc="Checking pairs",
        )
    return {name: table.data.column(name).to_numpy().copy() for name in MEASURES}

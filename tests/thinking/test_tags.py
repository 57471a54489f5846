"""The think boundary and replies taken apart, with the tokenizers of Qwen3, Thinking-2507 and SmolLM2."""

import copy

import pytest

import helpers
from helpers.common import UserError
from helpers.thinking.check import check_thinking
from helpers.thinking.tags import split_thinking, think_boundary

THOUGHT = "<think>\nSix and one is seven.\n</think>\n\nIt is 7."


def test_boundary_of_each_kind_of_model(qwen3, thinking_2507, tokenizer):
    hybrid = think_boundary(qwen3)
    assert (hybrid.kind, hybrid.open_ids, hybrid.close_ids) == ("hybrid", (151667,), (151668,))
    assert hybrid.one_token and not hybrid.prompt_opens and not hybrid.prompt_skips
    assert think_boundary(qwen3, enable_thinking=True) == hybrid
    assert think_boundary(qwen3, enable_thinking=False).prompt_skips

    only = think_boundary(thinking_2507)
    assert only.kind == "thinking-only" and only.prompt_opens and only.one_token

    ordinary = think_boundary(tokenizer)
    assert ordinary.kind == "ordinary" and not ordinary.prompt_opens and not ordinary.one_token
    assert tokenizer.decode(list(ordinary.open_ids)) == "<think>" and len(ordinary.open_ids) == 3


def test_boundary_of_a_hybrid_whose_prompt_opens_the_thought(qwen3):
    """As Qwen3.5 does: open by default, closed at once with enable_thinking=False."""
    other = copy.copy(qwen3)  # of which only the template is changed
    body, condition, end = qwen3.chat_template.rpartition("{%- if add_generation_prompt %}")
    other.chat_template = (
        body + condition + end.replace("{%- endif %}", "{%- else %}{{- '<think>\\n' }}{%- endif %}", 1)
    )
    assert think_boundary(other).kind == "hybrid" and think_boundary(other).prompt_opens
    assert not think_boundary(other, enable_thinking=False).prompt_opens


def test_boundary_without_a_chat_template(tokenizer):
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        think_boundary(bare)


@pytest.mark.parametrize(
    "text, opened, thought, answer, problems",
    [
        ("<think>\na\n</think>\n\nb", False, "a", "b", ()),
        ("a\n</think>\n\nb", True, "a", "b", ()),
        ("b", False, None, "b", ()),
        ("<think>\na and no end", False, "a and no end", None, ("unclosed",)),
        ("a and no end", True, "a and no end", None, ("unclosed",)),
        ("<think>\n\n</think>\n\nb", False, "", "b", ("empty",)),
        ("\n</think>\n\nb", True, "", "b", ("empty",)),
        ("<think>\n<think>\na\n</think>\n\nb", False, "<think>\na", "b", ("nested",)),
        ("<think>\na\n</think>\n\nb", True, "<think>\na", "b", ("nested",)),
        ("<think>a</think>b<think>c</think>d", False, "a</think>b<think>c", "d", ("repeated",)),
        ("<think>a</think></think>b", False, "a</think>", "b", ("repeated",)),
        ("<think>a</think>b<think>c", False, "a</think>b<think>c", None, ("repeated", "unclosed")),
        ("a</think>b", False, "a", "b", ("unopened",)),
        ("So: <think>a</think>b", False, "a", "b", ("text before",)),
        ("<thinking>a</thinking>b", False, None, "<thinking>a</thinking>b", ("spelling",)),
        ("[THINK]a[/THINK]b", False, None, "[THINK]a[/THINK]b", ("spelling",)),
        ("<Think>a</Think>b", False, None, "<Think>a</Think>b", ("spelling",)),
        ("<think>a</think>b<|im_end|>\nc", False, "a", "b", ()),
        ("", False, None, "", ()),
    ],
)
def test_split(tokenizer, text, opened, thought, answer, problems):
    found = split_thinking(text, tokenizer, opened)
    assert (found.thought, found.answer, found.problems) == (thought, answer, problems)
    assert found.well_formed == (thought is not None and not problems)
    assert split_thinking(tokenizer.encode(text, add_special_tokens=False), tokenizer, opened) == found


def test_split_takes_the_model_s_own_prompt_as_given(qwen3, thinking_2507):
    assert split_thinking("a\n</think>\n\nb", thinking_2507).well_formed
    assert split_thinking(THOUGHT, thinking_2507).problems == ("nested",)
    assert split_thinking(THOUGHT, qwen3).well_formed


def test_split_of_ids_knows_the_token_from_its_letters(qwen3):
    ids = qwen3.encode(THOUGHT, add_special_tokens=False)
    assert split_thinking(ids + [qwen3.eos_token_id, 198], qwen3).answer == "It is 7."
    letters = [qwen3.convert_tokens_to_ids(piece) for piece in ("<", "think", ">")]
    assert qwen3.decode(letters) == "<think>"
    found = split_thinking(letters + qwen3.encode("a\n</think>\n\nb"), qwen3)
    assert found.problems == ("spelling", "unopened")


def test_front_door():
    assert helpers.think_boundary is think_boundary and helpers.split_thinking is split_thinking
    assert helpers.check_thinking is check_thinking

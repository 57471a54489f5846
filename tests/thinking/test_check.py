"""What `check_thinking` finds, and what it leaves alone, with the tokenizers of Qwen3, Thinking-2507 and SmolLM2."""

import copy

import pytest

from helpers.common import UserError
from helpers.data.check import check_pairs
from helpers.thinking.check import check_thinking
from helpers.thinking.pairs import load_thinking_pairs, render_thinking

THOUGHT = "<think>\nSix and one is seven.\n</think>\n\nIt is 7."


def row(chosen, rejected=THOUGHT, prompt="What is 6 + 1?", **more):
    """A pair of one user turn, or of the given messages."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    sides = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": messages, **dict(zip(("chosen", "rejected"), sides, strict=True)), "origin": "f.jsonl:3", **more}


@pytest.mark.parametrize(
    "text, code",
    [
        ("<think>\nSix and one.\n\nIt is 7.", "thought_unclosed"),
        ("Six and one.\n</think>\n\nIt is 7.", "thought_unopened"),
        ("<think>\n<think>\nSix and one.\n</think>\n\nIt is 7.", "thought_nested"),
        ("<think>\nSix <think>and</think> one.\n</think>\n\nIt is 7.", "thought_nested"),
        ("<think>\nSix and one.\n</think>\n</think>\n\nIt is 7.", "thought_repeated"),
        ("<think>\nSix.\n</think>\n\n7?\n<think>\nYes.\n</think>\n\nIt is 7.", "thought_repeated"),
        ("<think>\n\n</think>\n\nIt is 7.", "thought_empty"),
        ("It is 7. <think>\nSix and one.\n</think>\n\n", "thought_late"),
        ("<thinking>\nSix and one.\n</thinking>\n\nIt is 7.", "think_spelling"),
        ("&lt;think&gt;\nSix and one.\n&lt;/think&gt;\n\nIt is 7.", "think_spelling"),  # escaped for HTML
    ],
)
def test_bad_tags_are_found_and_named(tokenizer, qwen3, text, code):
    for model in (tokenizer, qwen3):
        for pair, side in ((row(text), "chosen"), (row(THOUGHT, text), "rejected")):
            found = [finding for finding in check_thinking([row(THOUGHT), pair], model) if finding.code == code]
            assert len(found) == 1 and found[0].count == 1 and found[0].rows == (1,)
            assert found[0].origins == (f"f.jsonl:3 ({side})",) and found[0].why and found[0].cure


def test_whole_thoughts_are_clean(tokenizer, qwen3, thinking_2507, codes):
    for model in (tokenizer, qwen3, thinking_2507):
        assert codes([row(THOUGHT)], model) == set()
    assert codes([row("Six and one.\n</think>\n\nIt is 7.")], thinking_2507) == set()  # its template takes it so


def test_tag_in_the_prompt(tokenizer, qwen3, codes):
    for text in ("What is 6 + 1? <think>", "Put it in <thinking> tags: 6 + 1?"):
        for model in (tokenizer, qwen3):
            assert "think_in_prompt" in codes([row(THOUGHT, prompt=text)], model)
    earlier = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nno end"},
        {"role": "user", "content": "Go on"},
    ]
    assert "thought_unclosed" in codes([row(THOUGHT, prompt=earlier)], qwen3)


def test_a_prompt_that_ends_in_the_tag_and_a_text_that_opens_with_it(thinking_2507, codes):
    """The usual recipe: the template's text as prompt, and a chosen text that brings its own tag."""
    prompt = thinking_2507.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    pair = {"prompt": prompt, "chosen": THOUGHT, "rejected": "Well.\n</think>\n\nNo."}
    assert codes([pair], thinking_2507) == {"thought_nested"}
    assert codes([pair | {"chosen": THOUGHT.removeprefix("<think>\n")}], thinking_2507) == set()


def test_thought_in_a_prompt_that_skips_it(qwen3, codes):
    switched_off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert codes([row(THOUGHT, **switched_off)], qwen3) == {"thought_breaks_prompt"}
    assert codes([row("It is 7.", "It is 8.", **switched_off)], qwen3) == set()


def test_plain_answer_for_a_thinking_only_model(thinking_2507, codes):
    assert "thought_breaks_prompt" in codes([row(THOUGHT, "It is 8.")], thinking_2507)


def test_template_that_drops_the_thought(qwen3, codes):
    """As DeepSeek-R1's does with every assistant turn."""
    other = copy.copy(qwen3)  # of which only the template is changed
    other.chat_template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] }}"
        "{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
    )
    assert codes([row(THOUGHT)], other) == {"thought_lost"}


def test_max_length_inside_the_thought(tokenizer, qwen3, codes, as_trained):
    for model in (tokenizer, qwen3):
        pair = row(THOUGHT, "<think>\n" + "Six and one is seven. " * 20 + "\n</think>\n\nIt is 7.")
        prompt, chosen, rejected = as_trained(pair, model)
        cut = [f for f in check_thinking([pair], model, len(chosen)) if f.code == "thought_cut"]
        assert cut[0].origins == ("f.jsonl:3 (rejected)",)
        answer = len(model.encode("\n\nIt is 7.<|im_end|>\n", add_special_tokens=False))
        assert codes([pair], model, len(rejected)) == set()
        assert codes([pair], model, len(rejected) - answer) == set()  # the cut falls into the answer
        assert codes([pair], model, len(rejected) - answer - 1) == {"thought_cut"}


def test_tags_in_a_model_that_has_none(tokenizer, qwen3):
    found = check_thinking([row(THOUGHT)], tokenizer)
    assert [(f.code, f.severity) for f in found] == [("tags_are_text", "warning")]
    assert check_thinking([row(THOUGHT)], qwen3) == []
    assert check_thinking([row("It is 7.", "It is 8.")], tokenizer) == []


def test_naive_pairs_are_called_one_sided(case, codes):
    tokenizer, switch = case
    naive = [pair | {"rejected_thought": None} for pair in load_thinking_pairs()]
    found = codes(render_thinking(naive, tokenizer, switch), tokenizer)
    assert found == (set() if switch is False else {"thought_one_sided"})


def test_findings_go_into_a_report(tokenizer):
    pairs = render_thinking(load_thinking_pairs()[:4], tokenizer)
    report = check_pairs(pairs, tokenizer).add(check_thinking([row("<think>\nno end")], tokenizer))
    assert "a thought without </think>" in str(report)
    with pytest.raises(UserError, match="f.jsonl:3"):
        report.raise_for_errors()


def test_pairs_that_are_not_rendered(tokenizer):
    with pytest.raises(UserError, match="render_thinking"):
        check_thinking(load_thinking_pairs(), tokenizer)

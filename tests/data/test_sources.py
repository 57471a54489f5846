"""Rows out of every container: what is read, what is left out, and what each refusal says to do."""

import gzip
import json

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from helpers.common import UserError
from helpers.data.load import load_pairs
from helpers.data.preferences import LeftOut
from helpers.data.sources import open_source

NAMES = ("prompt", "chosen", "rejected")
ROWS = [
    {"prompt": 'He said "hi", ok?', "chosen": "line 1\nline 2; x", "rejected": "NA"},
    {"prompt": "q2\twith tab", "chosen": "1.50", "rejected": '"quoted"'},
    {"prompt": "\u00e9 \U0001f600", "chosen": "None", "rejected": " lead"},
]
Q, R = ({"prompt": letter, "chosen": "a", "rejected": "b"} for letter in "qr")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows_of(source, split="train"):
    return [row for _, row in open_source(source, split).rows()]


def origins_of(source, split="train"):
    return [origin for origin, _ in open_source(source, split).rows()]


def write(path, content):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# What pandas writes; the last column of a pair says how.
PANDAS = {
    "index.csv": {},
    "all.csv": {"index": False, "quoting": 1},
    "tab.csv": {"index": False, "sep": "\t"},
    "semicolon.csv": {"index": False, "sep": ";", "encoding": "utf-8-sig"},
    "pipe.csv": {"index": False, "sep": "|"},
    "crlf.csv": {"index": False, "lineterminator": "\r\n"},
    "packed.csv.gz": {"index": False},
    "minimal.tsv": {"index": False, "sep": "\t"},
    "all.tsv": {"index": False, "sep": "\t", "quoting": 1},
}


@pytest.mark.parametrize("name", PANDAS)
def test_csv_that_pandas_wrote(name, tmp_path):
    pd.DataFrame(ROWS).to_csv(tmp_path / name, **PANDAS[name])
    rows = rows_of(tmp_path / name)
    assert [{key: row[key] for key in NAMES} for row in rows] == ROWS
    assert rows[0].keys() - set(NAMES) == ({"column 1"} if name == "index.csv" else set())


HEAD = "prompt,chosen,rejected\n"
TABS = HEAD.replace(",", "\t")
BAD = "more or fewer fields"
# Each file with its rows as tuples of fields, or with a fragment of the reason why a row is left out.
TEXTS = {
    # A mark at the start of one field and at the end of a later one: no row swallows the rows between.
    "stray.tsv": (TABS + 'q\t"a\tb\nr\ta\tb\ns\ta"\tb\n', [("q", '"a', "b"), ("r", "a", "b"), ("s", 'a"', "b")]),
    "speech.tsv": (TABS + 'q\tsaid "no" to\t"b"\n', [("q", 'said "no" to', '"b"')]),
    "open.tsv": (TABS + 'q\t"a\tb\n', [("q", '"a', "b")]),
    "doubled.tsv": (TABS + 'q\t"said ""no"""\tb\n', [("q", 'said "no"', "b")]),
    "named.tsv": ('"prompt"\t"chosen"\t"rejected"\n"q"\t"a"\t"b"\n', [("q", "a", "b")]),
    "lines.tsv": (TABS + 'q\t"a\n2"\tb\nr\ta\tb\n', [("q", "a\n2", "b"), ("r", "a", "b")]),
    "commas.tsv": ("prompt\tchosen, good, better, best\trejected\nq\ta\tb\n", None),
    "tab.csv": (TABS + 'q\t"a"\tb\n', [("q", "a", "b")]),
    "uneven.tsv": (TABS + 'q\t"a\nq\ta\tb\tc\n\nq\ta\tb\n', [BAD, BAD, ("q", "a", "b")]),
    "uneven.csv": (HEAD + "q,a\nq,a,b,c\n\nq,a,b\n", [BAD, BAD, ("q", "a", "b")]),
    "excel.csv": ("sep=;\r\nprompt;chosen;rejected\r\nq;a, 1;b\r\n", [("q", "a, 1", "b")]),
    "blank.csv": ("\n\n" + HEAD + "\nq,a,b\n\n", [("q", "a", "b")]),
    "cr.csv": ("prompt,chosen,rejected\rq,a,b\rr,a,b\r", [("q", "a", "b"), ("r", "a", "b")]),
    "break.csv": (HEAD + '\r\nq,"a\r\n1",b\r\n', [("q", "a\r\n1", "b")]),
    "nul.csv": (HEAD + "q\0x,a,b\n", [("q\0x", "a", "b")]),
    "spaced.csv": (HEAD.replace(",", ", ") + '"q, r", "a", b\n', [("q, r", "a", "b")]),
    "long.csv": (HEAD + f"q,{'a' * 300_000},b\n", [("q", "a" * 300_000, "b")]),
    "nothing.tsv": (TABS + "q\t\\N\tb\n", [("q", None, "b")]),
    "names.csv": ("prompt;chosen;rejected;notes (a, b, c, d)\nq;a;b;c\n", [("q", "a", "b", "c")]),
    "pandas.csv": (
        HEAD + 'q,"Here it is:\nParis, of course","b, c"\nr,"a ""x""",b\n',
        [("q", "Here it is:\nParis, of course", "b, c"), ("r", 'a "x"', "b")],
    ),
    "several.csv": (HEAD + 'q,"a, 1\n2, 3",b\nr,"a\n1",b\n', [("q", "a, 1\n2, 3", "b"), ("r", "a\n1", "b")]),
    "r.csv": ('"","prompt","chosen","rejected"\n"1","q","a, ""x""","b"\n', [("1", "q", 'a, "x"', "b")]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_fields_are_what_the_file_holds(name, tmp_path):
    text, wanted = TEXTS[name]
    rows = rows_of(write(tmp_path / name, text))
    if wanted is None:
        assert rows == [{"prompt": "q", "chosen, good, better, best": "a", "rejected": "b"}]
        return
    assert len(rows) == len(wanted)
    for row, fields in zip(rows, wanted, strict=True):
        if isinstance(fields, str):
            assert isinstance(row, LeftOut) and fields in str(row)
        else:
            assert tuple(row.values()) == fields


def test_a_csv_origin_is_the_line_that_the_row_starts_on(tmp_path):
    text = "\nsep=;\nprompt;chosen;rejected\n"
    assert origins_of(write(tmp_path / "a.csv", text[1:] + 'q;"a\n1";b\nq;a;b\n')) == ["a.csv:3", "a.csv:5"]
    assert origins_of(write(tmp_path / "b.csv", "\n\n" + HEAD + "\nq,a,b\n")) == ["b.csv:5"]
    assert origins_of(write(tmp_path / "c.tsv", TABS + 'q\t"a\tb\n\nq\ta"\tb\n')) == ["c.tsv:2", "c.tsv:4"]


# Each JSON text with its rows and the first origin (after the name).
MESSAGES = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER], "tags": ["x", "y"]}
JSON = {
    "lines, CRLF and a blank one": (lines_of([Q, R]).replace("\n", "\r\n\r\n"), [Q, R], ":1"),
    "lines, CR": (lines_of([Q, R]).replace("\n", "\r"), [Q, R], ":1"),
    "one line": (json.dumps(Q), [Q], ":1"),
    "pretty objects": ("\n".join(json.dumps(row, indent=1) for row in (Q, R)), [Q, R], ":1"),
    "objects without a break": (json.dumps(Q) + json.dumps(R), [Q, R], ":1"),
    "one pretty object": ("\n" + json.dumps(Q, indent=1), [Q], ":2"),
    "a pretty list": (json.dumps([Q, R], indent=1), [Q, R], " row 1"),
    "a wrapper": (json.dumps({"version": 1, "about": {"by": "us"}, "data": [Q, R]}), [Q, R], " row 1"),
    "a pretty wrapper": (json.dumps({"data": [Q, R]}, indent=1), [Q, R], " row 1"),
    "columns": (json.dumps({key: [Q[key], R[key]] for key in NAMES}), [Q, R], " row 1"),
    "columns by pandas": (json.dumps({key: {"0": Q[key], "1": R[key]} for key in NAMES}), [Q, R], " row 1"),
    "columns in a wrapper": (json.dumps({"data": {key: [Q[key], R[key]] for key in NAMES}}), [Q, R], " row 1"),
    "rows by id in a wrapper": (json.dumps({"data": {"id1": Q, "id2": R}}), [Q, R], " row 1"),
    "one row by id": (json.dumps({"id1": Q}), [Q], " row 1"),
    "rows by id": (json.dumps({"id1": Q, "id2": R}), [Q, R], " row 1"),
    "one row of messages": (json.dumps(MESSAGES), [MESSAGES], ":1"),
    "one row of single messages": (
        json.dumps({"chosen": ANSWER, "rejected": ANSWER}),
        [{"chosen": ANSWER, "rejected": ANSWER}],
        ":1",
    ),
    "one row with a list": (json.dumps(Q | {"tags": ["x"]}), [Q | {"tags": ["x"]}], ":1"),
    "NaN": ('{"s": NaN, "i": Infinity}\n{"s": 1}', [{"s": None, "i": float("inf")}, {"s": 1}], ":1"),
    "half an emoji": (
        '{"m": {"n": ["\\ud83d", "\\ud83d\\ude00"]}}\n' * 2,
        [{"m": {"n": ["\ufffd", "\U0001f600"]}}] * 2,
        ":1",
    ),
    "half an emoji in a list": ('[{"m": {"n": ["\\uD83D"]}}]', [{"m": {"n": ["\ufffd"]}}], " row 1"),
}


@pytest.mark.parametrize("what", JSON)
def test_json_in_every_shape(what, tmp_path):
    text, wanted, origin = JSON[what]
    path = write(tmp_path / "a.json", text)
    assert rows_of(path) == wanted
    assert origins_of(path)[0] == f"a.json{origin}"


def test_python_objects_in_every_shape():
    frame = pd.DataFrame(ROWS)
    for source in (frame.to_dict("list"), frame.to_dict(), frame.to_dict("records"), frame.to_dict("index")):
        assert rows_of(source) == ROWS
    assert rows_of(dict(Q)) == [Q]
    opened = open_source((row for row in ROWS), "train")
    assert [list(opened.rows()), list(opened.rows())] == [[(f"row {n}", row) for n, row in enumerate(ROWS, 1)]] * 2
    half = "\ud83d"
    assert rows_of([{"m": [{half: half}], "n": float("nan"), "t": ("x", pd.NA)}]) == [
        {"m": [{"\ufffd": "\ufffd"}], "n": None, "t": ["x", None]}
    ]


def test_frames_of_pandas_and_arrow():
    frame = (
        pd.DataFrame(ROWS)
        .assign(
            score=[1.0, float("nan"), 2.0],
            parts=[pd.array(["a"]).to_numpy(), None, pd.array(["b", "c"]).to_numpy()],
            when=pd.Timestamp("2024-05-01"),
            kind=pd.Categorical(["x", "y", "x"]),
        )
        .iloc[[1, 2]]
    )  # not a plain range, so pandas hands its row numbers over too
    wanted = [
        ROWS[1] | {"score": None, "parts": None, "when": pd.Timestamp("2024-05-01"), "kind": "y"},
        ROWS[2] | {"score": 2.0, "parts": ["b", "c"], "when": pd.Timestamp("2024-05-01"), "kind": "x"},
    ]
    for table in (frame, pa.table(frame)):
        assert rows_of(table) == wanted
        assert origins_of(table) == ["table row 1", "table row 2"]
        assert [row["kind"] for row in load_pairs(table)] == ["y", "x"]
    with pytest.raises(UserError, match=r"DataFrame.*column mixed.*to_dict\('records'\)"):
        rows_of(frame.assign(mixed=[1, "x"]))
    with pytest.raises(UserError, match=r"Duplicate column names.*a name of its own"):
        rows_of(pd.concat([frame, frame[["prompt"]]], axis=1))


def test_tables_with_the_types_of_other_libraries(tmp_path):
    # What polars holds: views of texts, and categories of them, which pyarrow alone can't cast.
    view = pa.table({"prompt": pa.array(["q", "r"], pa.string_view()), "chosen": ["a", "a"], "rejected": ["b", "b"]})
    categories = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["x", "y"], pa.string_view()))
    kinds = view.append_column("kind", categories)
    assert rows_of(kinds) == [Q | {"kind": "x"}, R | {"kind": "y"}]
    typed = pa.table(
        {
            "prompt": pa.array(["q", "r"]).dictionary_encode(),
            "chosen": pa.array(["a", "a"], pa.large_string()),
            "rejected": pa.array(["b", "b"], pa.string_view()),
            "meta": pa.array([{"x": None, "y": "z"}, None]),
        }
    )
    pq.write_table(typed, tmp_path / "a[1].parquet")  # brackets are no pattern if there is a file of that name
    assert rows_of(tmp_path / "a[1].parquet") == [Q | {"meta": {"x": None, "y": "z"}}, R | {"meta": None}]
    for name, writer in (("file.arrow", pa.ipc.new_file), ("stream.feather", pa.ipc.new_stream)):
        with writer(tmp_path / name, view.schema) as file:
            file.write_table(view)
        assert rows_of(tmp_path / name) == [Q, R]


def test_saved_datasets(tmp_path):
    Dataset.from_list([Q]).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list([Q]), test=Dataset.from_list([R])).save_to_disk(tmp_path / "more")
    assert open_source(tmp_path / "one", "train").key
    assert [rows_of(tmp_path / "one"), rows_of(tmp_path / "more"), rows_of(tmp_path / "more", "test")] == [
        [Q],
        [Q],
        [R],
    ]
    with pytest.raises(UserError, match="no split 'dev'.*train, test"):
        rows_of(tmp_path / "more", "dev")
    with pytest.raises(UserError, match=r"list\(dataset.take"):
        rows_of(Dataset.from_list([Q]).to_iterable_dataset())


def test_shards_in_a_folder_or_by_a_pattern(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    write(folder / "b.jsonl", lines_of([R, R]))
    write(folder / "a.jsonl", lines_of([Q, Q]))
    write(folder / "README.md", "about")
    for source in (folder, folder / "*.jsonl", str(tmp_path / "*" / "?.jsonl"), str(tmp_path / "**" / "*.jsonl")):
        assert rows_of(source) == [Q, Q, R, R]
        assert origins_of(source) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    monkeypatch.chdir(tmp_path)
    before = open_source("data/*.jsonl", "train").key
    write(folder / "b.jsonl", lines_of([R, Q]))
    assert before != open_source("data/*.jsonl", "train").key
    # Files of one name in several folders are told apart.
    write(tmp_path / "more" / "a.jsonl", lines_of([R, Q]))
    assert origins_of(tmp_path / "*" / "a.jsonl")[::2] == ["data/a.jsonl:1", "more/a.jsonl:1"]
    write(folder / "c.csv", HEAD)
    with pytest.raises(UserError, match=r"data holds several kinds of file: .csv \(1\), .jsonl \(2\).*pattern"):
        rows_of(folder)
    with pytest.raises(UserError, match="There is no file .*none-"):
        rows_of(folder / "none-*.jsonl")
    (tmp_path / "bare" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="bare is a folder without a file in .jsonl, .*It holds inside"):
        rows_of(tmp_path / "bare")


def test_a_row_that_goes_on_in_the_next_file_is_asked_about(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in (Q, R, Q))
    for cut in range(len(json.dumps(Q)) + 2, len(json.dumps(Q) + json.dumps(R)) + 1):
        (tmp_path / "part-0.jsonl").write_text(text[:cut])
        (tmp_path / "part-1.jsonl").write_text(text[cut:])
        with pytest.raises(UserError, match="part-0.jsonl, line 2, .* goes on in the next file, join the files"):
            rows_of(tmp_path)


def test_shards_of_one_split(tmp_path):
    for part, row in enumerate((Q, R)):
        Dataset.from_list([row]).to_parquet(tmp_path / f"train-0000{part}-of-00002.parquet")
    assert rows_of(tmp_path) == [Q, R] and open_source(tmp_path, "train").features == Dataset.from_list([Q]).features
    assert load_pairs(tmp_path)["origin"][1] == "train-00001-of-00002.parquet row 1"
    for other in ("test-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet", "my_dev.parquet"):
        Dataset.from_list([{"prompt": None, "chosen": "a", "rejected": "b"}]).to_parquet(tmp_path / other)
        with pytest.raises(UserError, match=r"several splits: .*train \(2\)"):
            rows_of(tmp_path)
        assert rows_of(tmp_path / "train-*") == [Q, R]
        (tmp_path / other).unlink()
    # A column that one part leaves empty has another type there; the rows say what it is.
    Dataset.from_list([Q | {"chosen": None}]).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    assert open_source(tmp_path, "train").features is None


# What each refusal says.
REFUSED = {
    "utf16.csv": (HEAD.encode("utf-16"), "written in UTF-16. Save it as UTF-8"),
    "bare.csv": (HEAD.encode("utf-16-le"), "written in UTF-16"),
    "big.jsonl": (b"\0{\0}", "written in UTF-16"),
    "packed.jsonl.gz": (gzip.compress(lines_of([Q]).encode("utf-16")), "written in UTF-16"),
    "pairs.xlsx": (b"PK\x03\x04", "spreadsheet. Save the sheet as CSV"),
    "sheet.csv": (b"PK\x03\x04", "a spreadsheet or an archive. Save the sheet as CSV"),
    "pairs.jsonl.zst": (b"(\xb5/\xfd", "is packed. Unpack it"),
    "pairs.jsonl": (gzip.compress(b"{}"), "gzipped, so its name must end in .gz"),
    "pairs.zip": (b"PK", "is packed. Unpack it"),
    "pairs.bz2": (b"BZh", "is packed. Unpack it"),
    "pairs.png": (b"\x89PNG", "is a picture"),
    "pairs.sqlite": (b"SQLite", "is a database. .*read_sql"),
    "pairs.txt": (b"q", "'.txt'. Save its rows as JSONL"),
    "pairs.yaml": (b"- q", "'.yaml'. Save its rows as JSONL"),
    "page.csv": (b"\n<!DOCTYPE html>", "is a web page. Download the file itself"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "pointer to the file. Run git lfs pull"),
    "two.csv": (HEAD + 'q,"a,b\nr,a",b\n', "two ways: as 1 rows with quotes .* or as 2 rows"),
    "two.tsv": (TABS + 'q\t"a\tb\nr\ta\tb\nx\ny\ta"\tb\n', "two ways: as 1 rows with quotes .* or as 3 rows"),
    "ends.csv": (HEAD + "q,a,b,\nr,a,b,\n", "rows end in ',', and so have an empty field more than line 1"),
    "big.csv": (HEAD.encode("utf-32"), "written in UTF-32"),
    "table.csv": ("| prompt | chosen | rejected |\r\n|---|:-:|---|\r\n| q | a | b |\r\n", "a table in Markdown"),
    "rows.csv": (lines_of([Q, R]), "holds JSON: its name must end in .jsonl"),
    "list.tsv": (json.dumps([Q], indent=1), "holds JSON"),
    "table.jsonl": (b"PAR1\x15\x04", "a table in Parquet or Arrow: its name must end in .parquet"),
    "packed.json.gz": (gzip.compress(b"a.json".ljust(257, b"\0") + b"ustar"), "is an archive"),
    "names.tsv": ('"prompt"\t"chosen"\n"1"\t"q"\t"a"\n', "no row has as many fields as line 1, .*'prompt', 'chosen'"),
    "about.csv": ("# made by us\n" + HEAD + "q,a,b\n", "no row has as many fields as line 1.*'# made by us'"),
    "twice.csv": ("prompt,chosen, chosen\nq,a,b\n", "same name, 'chosen'"),
    "escaped.csv": (HEAD + '"say \\"hi\\"",a,b\n', "line 2: not valid CSV .*a quote in it must be doubled"),
    "comma.jsonl": (lines_of([Q, R]).replace("\n", ",\n"), "line 1, column 48: .*Take out that comma"),
    "late.jsonl": (lines_of([Q]) + json.dumps(R) + ",\n", "late.jsonl, line 2, column 48: .*Take out that comma"),
    "last.json": (f"[{json.dumps(Q)},\n]", "line 2, column 1: .*If there is a comma before it"),
    "joined.jsonl": (lines_of([Q]) + json.dumps(Q) * 2, "line 2, column 48: .*second object .* line of its own"),
    "python.jsonl": (f"{Q}\n{R}\n", "line 1, column 2: .*double quotes"),
    "keys.jsonl": (lines_of([Q]) + '{"a": 1, "a": 2}\n', "keys.jsonl, line 2: .*the key 'a' is there twice"),
    "first.jsonl": ('{"a": 1, "a": 2}\n' + lines_of([Q]), "first.jsonl, line 1: .*the key 'a' is there twice"),
    "nested.json": ('[{"m": {"a": 1, "a": 2}}]', "nested.json: .*the key 'a' is there twice in the object {'a': 2}"),
    "deep.jsonl": ("[" * 200_000 + "\n" + lines_of([Q]), "deep.jsonl.*not valid JSON"),
    "long.json": (
        json.dumps({"prompt": ["q", "r"], "chosen": ["a"]}),
        r"unequal length: 'prompt' \(2\), 'chosen' \(1\)",
    ),
    "splits.json": (json.dumps({"train": [Q, Q], "test": [R]}), r"several lists of rows: 'train' \(2\), 'test' \(1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_says_what_to_do(name, tmp_path):
    content, wanted = REFUSED[name]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"(?s){wanted}") as caught:
        rows_of(path)
    assert str(caught.value).startswith(name) and len(str(caught.value)) < 500
    path.unlink()
    with pytest.raises(UserError, match="There is no file"):
        rows_of(path.name)


def test_the_hub_says_which_sets_and_splits_there_are(tmp_path, monkeypatch):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
    write(tmp_path / "hub" / "README.md", f"---\nconfigs:\n{configs}---\n")
    for name in ("one", "two"):
        write(tmp_path / "hub" / f"{name}.jsonl", lines_of([Q]))
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: real(str(tmp_path / "hub"), split=split))
    with pytest.raises(UserError, match=r"\['one', 'two'\].*load_pairs\(datasets.load_dataset\('some/pairs', NAME"):
        rows_of("some/pairs")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: real(str(tmp_path / "hub"), "one", split=split))
    assert rows_of("some/pairs") == [Q]
    with pytest.raises(UserError, match=r"Unknown split \"test\". Should be one of \['train'\]"):
        rows_of("some/pairs", "test")


# What JSON text in a file of this name is asked about, or its rows.
ASKED = {
    "parts.json": ({"train": Q, "test": R}, "holds several parts: 'train', 'test'"),
    "columns.json": (
        {key: {name: [Q[name]] for name in NAMES} for key in ("train_prefs", "test_prefs")},
        "several parts",
    ),
    "system.json": ({"system_prompt": "Be brief.", "data": [Q]}, "'system_prompt' stands next to the list of rows"),
    "task.json": ({"instruction": "Translate.", "examples": [Q]}, "'instruction' stands next to the list"),
    "questions.json": ({f"What is {n}?": {"chosen": "a", "rejected": "b"} for n in "qr"}, "keys like 'What is q.'"),
    "empty.json": ({}, []),
    "errors.json": ({"data": [Q], "errors": []}, [Q]),
    "dev.json": ({"train": [Q, R], "test": []}, [Q, R]),
    "turns.jsonl": ({name: [name, name] for name in NAMES}, [{name: [name, name] for name in NAMES}]),
    "objects.jsonl": ({name: {"text": name} for name in NAMES}, [{name: {"text": name} for name in NAMES}]),
    "talks.jsonl": ({name: [{"by": "us"}] for name in NAMES}, [{name: [{"by": "us"}] for name in NAMES}]),
    "wrapper.jsonl": ({"version": 1, "data": [Q, R]}, [Q, R]),
    "mark.jsonl": ({"\ufeffprompt": "q", "chosen": "a", "rejected": "b"}, [Q]),
    "lists.json": ([[1], [2]], "no row is an object, the first is a list"),
    "texts.json": ([json.dumps(Q)], "no row is an object, the first is a text.*json.loads"),
}


@pytest.mark.parametrize("name", ASKED)
def test_json_that_could_be_read_in_two_ways_is_asked_about(name, tmp_path):
    whole, wanted = ASKED[name]
    path = write(tmp_path / name, json.dumps(whole))
    if isinstance(wanted, list):
        assert rows_of(path) == wanted
    else:
        with pytest.raises(UserError, match=f"(?s)^{name}.*{wanted}"):
            rows_of(path)


def test_python_objects_that_are_no_rows_are_named(tmp_path):
    frame = pd.DataFrame(ROWS)
    for source in ({"train": frame}, dict(frame.items())):
        with pytest.raises(UserError, match="holds tables or columns of tables .*Pass one table"):
            rows_of(source)
    with pytest.raises(UserError, match="no row is an object, the first is a PosixPath.*by a pattern"):
        rows_of([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    with pytest.raises(UserError, match="several parts: 'train', 'test'"):
        rows_of({"train": frame.to_dict("list"), "test": frame.to_dict("list")})
    with pytest.raises(UserError, match=r"^list can't be read.*write it as a text, str\(value\)"):
        load_pairs([Q | {"file": tmp_path}])
    for text, wanted in ((json.dumps([Q] * 99), "is a text, not the name"), ("https://x.org/a.jsonl", "is an address")):
        with pytest.raises(UserError, match=wanted) as caught:
            rows_of(text)
        assert len(str(caught.value)) < 250


def test_what_a_folder_holds_besides_is_named(tmp_path, capsys):
    folder = tmp_path / "data"
    for name in ("a.jsonl", "_b.jsonl", "c.txt", "more/d.jsonl", ".hidden"):
        write(folder / name, lines_of([Q]))
    assert rows_of(folder) == [Q]
    assert capsys.readouterr().out == "data: not read: _b.jsonl, c.txt, more/\n"
    (folder / "link.jsonl").symlink_to("../nowhere")
    for source in (folder, folder / "*.jsonl", folder / "link.jsonl"):
        with pytest.raises(UserError, match="link.jsonl is a link to a file that is not here. Fetch"):
            rows_of(source)


HELD_OUT = ["pairs pairs_test", "training testing", "train holdout", "trainset testset", "a held-out", "train/a test/a"]


@pytest.mark.parametrize("names", HELD_OUT)
def test_files_to_test_on_are_never_read_with_the_others(names, tmp_path):
    for name in names.split():
        write(tmp_path / "data" / f"{name}.jsonl", lines_of([Q]))
    with pytest.raises(UserError, match="holds several splits: "):
        rows_of(tmp_path / "data" / "**" / "*.jsonl")


@pytest.mark.parametrize(
    "names", ["a b", "train more", "contest latest", "train-0-of-2 train-1-of-2 more", "test_a test_b"]
)
def test_files_of_one_split_are_read_together(names, tmp_path):
    for name in names.split():
        write(tmp_path / f"{name}.jsonl", lines_of([Q]))
    assert rows_of(tmp_path) == [Q] * len(names.split())


def test_the_cache_knows_a_shard_by_its_name(tmp_path):
    for name in "ab":
        write(tmp_path / "data" / f"{name}.jsonl", lines_of([Q]))
    load_pairs(tmp_path / "data")
    (tmp_path / "data" / "b.jsonl").rename(tmp_path / "data" / "z.jsonl")
    assert load_pairs(tmp_path / "data")["origin"][:] == ["a.jsonl:1", "z.jsonl:1"]


def test_names_of_classes_are_read_and_media_stay_bytes(tmp_path, capsys):
    rows = [{"prompt": "q", "response_1": "a", "response_2": "b", "winner": winner} for winner in (0, 1, 2, None)]
    data = Dataset.from_list(rows).cast_column("winner", ClassLabel(names=["response_2", "response_1", "tie"]))
    data.to_parquet(tmp_path / "pairs.parquet")
    for source in (data, tmp_path / "pairs.parquet"):
        assert [row["chosen"][0]["content"] for row in load_pairs(source)] == ["b", "a"]
        assert "response_1 -> response_1 (1), response_2 -> response_2 (1), tie -> tie" in capsys.readouterr().out
    for media in (datasets.Audio(), datasets.Image()):
        typed = datasets.Features({**{name: datasets.Value("string") for name in NAMES}, "heard": media})
        table = pa.table({**{name: ["x"] for name in NAMES}, "heard": pa.array([{"bytes": b"RIFF", "path": None}])})
        data = Dataset(table.cast(typed.arrow_schema))
        assert load_pairs(data)["heard"][:] == [{"bytes": b"RIFF", "path": None}]


def test_numbers_of_64_bits_and_marks_in_names_of_columns(tmp_path):
    big = pa.table({**{name: [text] for name, text in Q.items()}, "hash": pa.array([2**63 + 1], pa.uint64())})
    pq.write_table(big, tmp_path / "big.parquet")
    for source in (big, tmp_path / "big.parquet"):
        assert load_pairs(source)["hash"][:] == [2**63 + 1]
    assert rows_of(pd.DataFrame([Q]).rename(columns={"prompt": "\ufeffprompt"})) == [Q]
    assert rows_of(write(tmp_path / "marks.csv", "\ufeff\ufeffprompt,chosen,rejected\nq,a,b\n")) == [Q]
    maps = big.append_column("meta", pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())))
    pq.write_table(maps, tmp_path / "maps.parquet")
    with pytest.raises(UserError, match="maps.parquet can't be read.*Leave the column of that type out"):
        load_pairs(tmp_path / "maps.parquet")


def test_columns_by_pandas_may_be_named_like_a_split_and_a_pattern_may_begin_with_a_bracket(tmp_path):
    whole = {name: {"0": text} for name, text in (Q | {"test_score": 1}).items()}
    assert rows_of(write(tmp_path / "a.json", json.dumps(whole))) == [Q | {"test_score": 1}]
    assert rows_of(tmp_path / "[ab].json") == [Q | {"test_score": 1}]

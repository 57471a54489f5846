"""Foreign formats: every label is read right, or asked about.

`field/` holds small files in the shapes of public data sets and bug reports; `field/cases.json` says for each which
calls are tried and what is right.
"""

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import UserError
from helpers.data.layouts import FORMATS
from helpers.data.load import load_pairs
from helpers.data.report import load_report

FIELD = Path(__file__).parent / "field"
CASES = {case["name"].split()[0]: case for case in json.loads((FIELD / "cases.json").read_text(encoding="utf-8"))}
# Calls that are asked about, with what the question has to name, and files that are refused; the others are read.
ASKED = {
    ("04", "default"): r"'question', 'context'.*columns=\{'prompt': \['question', 'context'\]\}",
    ("23", "default"): r"'label'.*True \(2\), False \(1\).*wins=\{True: \.\.\., False: \.\.\.\}",
    ("23", "first_wins='a'"): r"first_wins='a'.*wins=\{True",
    ("24", "default"): r"'label' holds 1 \(1\), 0 \(1\)",
    ("25", "default"): r"'preference'.*wins='1 to 3 first, 4 to 6 second'",
    ("25", "as the error asks, first_wins=1"): r"first_wins=1 does not say.*wins=\{",
    ("26", "default"): r"'choice' holds 1 \(2\), 2 \(1\), 3 \(1\)",
    ("26", "as the error asks, first_wins=1"): r"first_wins=1 does not say.*3: \.\.\.",
    ("28b", "preference = score_0"): r"'score_0' holds 1.0 \(1\), -0.5 \(1\)",
    ("28b", "preference = score_1"): r"'score_1' holds",
    ("31", "default"): r"'label' holds 0 \(1\), 0.5 \(1\), 1 \(2\)",
    ("31", "first_wins=0"): r"first_wins=0 does not say.*0.5: \.\.\.",
    ("36", "default"): r"'not a': \.\.\., 'Neither A nor B': 'tie', 'Both A and B': 'tie', 'prefer A over B': 'first'",
    ("37", "mapped"): r"'labels' holds 1 \(1\), 0 \(1\)",
    ("58", "default"): r"line 1",
    ("60", "default"): "UTF-16.*UTF-8",
    ("62c", "default"): "spreadsheet.*CSV",
}
# What a question is answered with gives the right pairs.
ANSWERED = {
    "23": {"wins": {True: "first", False: "second"}},
    "24": {"wins": {1: "first", 0: "second"}},
    "25": {"wins": "1 to 3 first, 4 to 6 second"},
    "26": {"wins": {1: "first", 2: "second", 3: "tie"}},
    "28b": {"scores": ("score_0", "score_1"), "columns": {"prompt": "prompt"}},
    "31": {"wins": {0: "first", 0.5: "tie", 1: "second"}},
}
# Right results that are told in words: what is kept, and what the printed lines say.
TOLD = {
    "16": (["u:Name a tree.", "u:Name a bush."], r"1 left out: .*\(image\).*:3\)"),
    "45": (["u:Name a metal."] * 3, r"system or developer"),
    "47": (["u:Q: 2 + 2? A:", "u:Q: 3 + 3? A:"], r"^$"),  # check_pairs warns
    "48": (["u:Is it done?"], r"not read: 'context'.*the prompt is empty"),
    "53": (None, r"^$"),
    "59": (["u:Question 1?"], r"^$"),
    "68": (["u:Question 1?", "u:Question 2?", "u:Question 3?"], r"^$"),  # check_pairs has a finding
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def plain(row):
    """The three columns of a row as texts, to compare at a glance."""
    sides = (row["prompt"], row["chosen"], row["rejected"])
    return [" / ".join(f"{turn['role'][0]}:{turn['content']}" for turn in side) for side in sides]


def accounted(pairs, rows):
    report = load_report(pairs)
    assert report.rows == rows == len(pairs) + sum(group["count"] for group in report.left_out.values())


@pytest.mark.parametrize("name, call", [(name, call) for name, case in CASES.items() for call in case["calls"]])
def test_a_foreign_file_is_read_right_or_asked_about(name, call, capsys):
    case = CASES[name]
    path, arguments = FIELD / case["file"], case["calls"][call]
    if (name, call) in ASKED:
        with pytest.raises(UserError, match=f"(?s){re.escape(path.name)}.*{ASKED[name, call]}"):
            load_pairs(path, **arguments)
        if name not in ANSWERED:
            return
        arguments = ANSWERED[name]
    pairs = load_pairs(path, **arguments)
    printed = capsys.readouterr().out
    if isinstance(case["right"], list) and name != "16":
        assert [plain(row) for row in pairs] == case["right"]
    else:
        prompts, words = TOLD[name]
        assert prompts is None or [plain(row)[0] for row in pairs] == prompts
        assert re.search(f"(?s){words}", printed), printed
    if load_report(pairs).reading:
        assert load_report(pairs).reading[0] in printed


LISTED = yaml.load((FIELD / "foreign.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)  # safe, and ten times faster
FOREIGN = {case["what"]: case for case in LISTED}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_as_people_publish_it_is_read_right_or_asked_about(what, tmp_path, capsys):
    case = FOREIGN[what]
    path = tmp_path / case["file"]
    path.write_text(case["text"], encoding="utf-8", newline="")
    if "asked" in case:
        with pytest.raises(UserError, match=f"(?s)^{re.escape(path.name)}.*{case['asked']}"):
            load_pairs(path, **case.get("with", {}))
        return
    pairs = load_pairs(path, **case.get("with", {}))
    assert [plain(row) for row in pairs] == case["right"]
    accounted(pairs, load_report(pairs).rows)
    assert re.search(f"(?s){case.get('says', '')}", capsys.readouterr().out)
    assert [plain(row) for row in load_pairs(pairs)] == case["right"]


Q, ONE, TWO = "Which is larger?", "Ten.", "Two."
A_FIRST, B_FIRST = [f"u:{Q}", f"a:{ONE}", f"a:{TWO}"], [f"u:{Q}", f"a:{TWO}", f"a:{ONE}"]


def two(value, names=("response_a", "response_b"), column="preference", **more):
    return {"prompt": Q, names[0]: ONE, names[1]: TWO, column: value, **more}


ONE_TWO, ANSWERS = ("response_1", "response_2"), ("response1", "response2")
WHOLE = [[{"role": "user", "content": Q}, {"role": "assistant", "content": text}] for text in (ONE, TWO)]
LONGER = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, *side] for side in WHOLE]
MT_BENCH = {"winner": "model_a", "turn": 1, "conversation_a": LONGER[0], "conversation_b": LONGER[1]}
PAIR = {"prompt": Q, "chosen": ONE, "rejected": TWO}
READ = {
    # verdicts in words: whole, known values only
    "letter": ([two("A")], {}, [A_FIRST]),
    "A > B": ([two("A > B"), two("B>>A"), two("A=B")], {}, [A_FIRST, B_FIRST]),
    "brackets": ([two("[[A]]"), two("[[B]]")], {}, [A_FIRST, B_FIRST]),
    "hyphens": ([two("A-is-clearly-better"), two("B-is-slightly-better"), two("Tie")], {}, [A_FIRST, B_FIRST]),
    "sentence": ([two("Response 2 is better than Response 1", ONE_TWO)], {}, [B_FIRST]),
    "worse": ([two("Response 1 is much worse than Response 2", ONE_TWO)], {}, [B_FIRST]),
    "ordinals": ([two("first"), two("The second")], {}, [A_FIRST, B_FIRST]),
    "prefer": ([two("I prefer response B over response A")], {}, [B_FIRST]),
    "both bad": ([two("A"), two("tie (bothbad)"), two("both_bad")], {}, [A_FIRST]),
    "column name": ([two("response_b", ("response_a", "response_b"))], {}, [B_FIRST]),
    "index": ([two(0, ("answer_0", "answer_1")), two("1", ("answer_0", "answer_1"))], {}, [A_FIRST, B_FIRST]),
    "AlpacaEval": ([two(1.2, ("output_1", "output_2")), two(1.5, ("output_1", "output_2"))], {}, [A_FIRST]),
    "scores of a public format beside two system turns, of which one is named": (
        [
            {
                "prompt": Q,
                "system": "S",
                "system_prompt": "T",
                "answer_0": ONE,
                "answer_1": TWO,
                "score_0": 1,
                "score_1": 2,
            }
        ],
        {"scores": ["score_0", "score_1"], "columns": {"system": "system"}},
        [["s:S / " + B_FIRST[0], *B_FIRST[1:]]],
    ),
    # the winner by what it wrote, or by its name
    "model name": (
        [
            two("Llama 2", column="winner", model_a="GPT 1", model_b="Llama 2"),
            two("x", column="winner", model_a="x", model_b="y"),
        ],
        {},
        [B_FIRST, A_FIRST],
    ),
    "model name, the answers exchanged": (
        [two("x", column="winner", model_a="x", model_b="y"), two("y", column="winner", model_a="x", model_b="y")],
        {"columns": {"a": "response_b", "b": "response_a"}},
        [A_FIRST, B_FIRST],
    ),
    "model name, two of three answers": (
        [two("y", ("response_0", "response_1"), "winner", response_2="x", model_0="x", model_1="y", model_2="z")],
        {"columns": {"a": "response_0", "b": "response_1"}},
        [B_FIRST],
    ),
    "model name, other words and capitals": (
        [
            two("y", column="winner", Model_A_name="x", Model_B_name="y"),
            two("y", column="winner", Model_A_name="y", Model_B_name="x"),
        ],
        {},
        [B_FIRST, A_FIRST],
    ),
    "id of the winner": ([two("i2", column="winner", id_a="i1", id_b="i2")], {}, [B_FIRST]),
    "letters in front, exchanged": (
        [two("A", ("a_text", "b_text")), two("B", ("a_text", "b_text"))],
        {"columns": {"a": "b_text", "b": "a_text"}},
        [A_FIRST, B_FIRST],
    ),
    "ordinals in the names, exchanged": (
        [two("first", ("first_answer", "second_answer"))],
        {"columns": {"a": "second_answer", "b": "first_answer"}},
        [A_FIRST],
    ),
    "names as ClassLabel has them": (
        [two(value, ONE_TWO, "winner") for value in ("response_2", "tie", "response_1")],
        {},
        [B_FIRST, A_FIRST],
    ),
    "text of the answer": ([two(TWO, column="choice")], {}, [B_FIRST]),
    # numbers, once they are explained
    "sign": (
        [two(value, ONE_TWO) for value in (-2, 0, 3)],
        {"wins": "< 0 first, 0 tie, > 0 second"},
        [A_FIRST, B_FIRST],
    ),
    "probability": (
        [two(0.9), two(0.1), two(0.5)],
        {"wins": "> 0.5 first, 0.5 tie, < 0.5 second"},
        [A_FIRST, B_FIRST],
    ),
    "left out": ([two("yes"), two("skip")], {"wins": {"yes": "first", "skip": None}}, [A_FIRST]),
    "text of a number": ([two("1"), two(2.0)], {"wins": {1: "second", "2": "first"}}, [B_FIRST, A_FIRST]),
    "scores": ([two(None, s=1, t="0.5"), two(None, s=0, t=3)], {"scores": ("s", "t")}, [A_FIRST, B_FIRST]),
    # public formats by their columns
    "HelpSteer3": (
        [{"context": [{"role": "user", "content": Q}], "response1": ONE, "response2": TWO, "overall_preference": -3}],
        {},
        [A_FIRST],
    ),
    "HelpSteer2": ([two(2, ONE_TWO, "preference_strength")], {}, [B_FIRST]),
    "PKU": (
        [two(1, ("response_0", "response_1"), "better_response_id", safer_response_id=0, is_response_0_safe=True)],
        {},
        [B_FIRST],
    ),
    "WebGPT": (
        [{"question": {"full_text": Q}, "answer_0": ONE, "answer_1": TWO, "score_0": -0.5, "score_1": 0.5}],
        {},
        [B_FIRST],
    ),
    "MultiPref": (
        [
            {
                "text": Q,
                "completion_a": ONE,
                "completion_b": TWO,
                "normal_worker_annotations": [{"overall_pref": "A-is-slightly-better"}, {"overall_pref": "Tie"}],
                "expert_worker_annotations": [{"overall_pref": "A-is-clearly-better"}] * 2,
            }
        ],
        {},
        [A_FIRST],
    ),
    "OpenAI": (
        [
            {
                "input": {"messages": [{"role": "user", "content": Q}], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [{"role": "assistant", "content": ONE}],
                "non_preferred_output": [{"role": "assistant", "content": TWO}],
            }
        ],
        {},
        [A_FIRST],
    ),
    "ms-swift": (
        [
            {
                "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": ONE}],
                "rejected_response": TWO,
            }
        ],
        {},
        [A_FIRST],
    ),
    "torchtune": (
        [
            {
                "chosen_conversations": [{"role": "user", "content": Q}, {"role": "assistant", "content": ONE}],
                "rejected_conversations": [{"role": "user", "content": Q}, {"role": "assistant", "content": TWO}],
            }
        ],
        {},
        [A_FIRST],
    ),
    "StackExchange": ([{"question": Q, "response_j": ONE, "response_k": TWO}], {}, [A_FIRST]),
    "arena competition": (
        [
            {
                "prompt": json.dumps([Q]),
                "response_a": json.dumps([ONE]),
                "response_b": json.dumps([TWO]),
                "winner_model_a": "0",
                "winner_model_b": "1",
                "winner_tie": "0",
            }
        ],
        {},
        [B_FIRST],
    ),
    "arena": (
        [
            {
                "model_a": "m1",
                "model_b": "m2",
                "winner": "model_b",
                "judge": "arena_user_9",
                "conversation_a": [{"role": "user", "content": Q}, {"role": "assistant", "content": ONE}],
                "conversation_b": [{"role": "user", "content": Q}, {"role": "assistant", "content": TWO}],
            }
        ],
        {},
        [B_FIRST],
    ),
    "chatbot_arena_conversations": (
        [
            {
                "question_id": "58210e39",
                "model_a": "m1",
                "model_b": "m2",
                "winner": "model_b",
                "judge": "arena",
                "turn": 1,
                "anony": True,
                "language": "English",
                "tstamp": 1682351591.1,
                "conversation_a": WHOLE[0],
                "conversation_b": WHOLE[1],
                "openai_moderation": {"flagged": False},
                "toxic_chat_tag": {"flagged": False},
            }
        ],
        {},
        [B_FIRST],
    ),
    "the pair beside answers with ratings": (
        [
            {
                "instruction": Q,
                "generations": ["x", "y"],
                "ratings": [1, 2],
                "chosen_response": ONE,
                "rejected_response": TWO,
            }
        ],
        {},
        [A_FIRST],
    ),
    "the pair beside one more answer": (
        [{"query": Q, "response": "x", "chosen_response": ONE, "rejected_response": TWO}],
        {},
        [A_FIRST],
    ),
    "the pair beside answers": (
        [{"prompt": Q, "answers": ["x"], "better_response": ONE, "worse_response": TWO}],
        {},
        [A_FIRST],
    ),
    "texts that stand in other columns too": (
        [
            PAIR | {"responses": [ONE, TWO], "model": "x"},
            PAIR | {"responses": [{"text": ONE, "model": "x"}, {"text": TWO, "model": "y"}]},
        ],
        {},
        [A_FIRST] * 2,
    ),
    "names that are the answers": (
        [PAIR | {"chosen": "A", "rejected": "B", "option_a": "one", "option_b": "two"}],
        {"columns": {"chosen": "chosen", "rejected": "rejected"}},
        [[f"u:{Q}", "a:A", "a:B"]],
    ),
    "short answers next to other things": (
        [
            PAIR | {"chosen": "2", "rejected": "3", "score_2": 1, "score_3": 0, "ids": [7]},
            PAIR | {"chosen": "2", "rejected": "3", "options": ["1", "2", "3"]},
            PAIR | {"chosen": "Ann", "rejected": "Bo", "turns": [{"role": "user", "content": "Hi", "name": "Ann"}]},
        ],
        {},
        [[f"u:{Q}", "a:2", "a:3"]] * 2 + [[f"u:{Q}", "a:Ann", "a:Bo"]],
    ),
    "two families, of which one is empty in each row": (
        [
            {"prompt": Q, "chosen": ONE, "rejected": TWO, "chosen_response": None, "rejected_response": None},
            {"prompt": Q, "chosen": None, "rejected": None, "chosen_response": TWO, "rejected_response": ONE},
        ],
        {},
        [A_FIRST, B_FIRST],
    ),
    "Argilla's ranks that are texts, or a single one": (
        [
            two([{"value": [{"rank": 1, "value": "response1"}, {"rank": "2", "value": "response2"}]}], ANSWERS),
            two([{"value": {"rank": 1, "value": "response2"}}], ANSWERS),
            two([{"value": {"rank": None, "value": None}}], ANSWERS),
            two([{"value": {"rank": [None, None], "value": ["response1", "response2"]}}], ANSWERS),
            two([{"value": {"rank": [], "value": []}}], ANSWERS),
        ],
        {},
        [A_FIRST, B_FIRST],
    ),
    "summaries": ([{"info": {"post": Q}, "summaries": [{"text": ONE}, {"text": TWO}], "choice": 1}], {}, [B_FIRST]),
    "Prometheus": (
        [{"orig_instruction": Q, "orig_response_A": ONE, "orig_response_B": TWO, "orig_preference": "B"}],
        {},
        [B_FIRST],
    ),
    "UltraFeedback": (
        [
            {
                "instruction": Q,
                "completions": [
                    {"response": "Six.", "overall_score": 5.0},
                    {"response": TWO, "overall_score": 2.0},
                    {"response": ONE, "overall_score": 8.5},
                ],
            }
        ],
        {},
        [A_FIRST],
    ),
    "Nectar": (
        [
            {
                "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
                "answers": [{"answer": TWO, "rank": 7}, {"answer": ONE, "rank": 1}],
            }
        ],
        {},
        [A_FIRST],
    ),
    "distilabel": ([{"instruction": Q, "generations": [TWO, ONE], "ratings": [1, 5]}], {}, [A_FIRST]),
    "Label Studio": (
        [
            {
                "data": {"prompt": Q, "answer1": ONE, "answer2": TWO},
                "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "right"}}]}],
            }
        ],
        {},
        [B_FIRST],
    ),
    "Label Studio, JSON-MIN": ([two("left", ("answer1", "answer2"), "comparison")], {}, [A_FIRST]),
    "HelpSteer2, several turns": (
        [
            two(1, ONE_TWO, "preference_strength")
            | {"prompt": f"Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n{Q}"}
        ],
        {},
        [[f"u:Hi / a:Yes? / u:{Q}", *B_FIRST[1:]]],
    ),
    "Vertex AI": ([{"input_text": Q, "candidate_0": ONE, "candidate_1": TWO, "choice": 1}], {}, [B_FIRST]),
    "ms-swift, query": (
        [{"query": Q, "response": ONE, "rejected_response": TWO, "history": [["Hi", "Yes?"]]}],
        {},
        [[f"u:Hi / a:Yes? / u:{Q}", *A_FIRST[1:]]],
    ),
    "MedicalGPT": (
        [{"system": "", "history": [], "question": Q, "response_chosen": ONE, "response_rejected": TWO}],
        {},
        [A_FIRST],
    ),
    "StackExchange, scores": (
        [{"qid": 1, "question": Q, "answers": [{"text": TWO, "pm_score": 1}, {"text": ONE, "pm_score": 4}]}],
        {},
        [A_FIRST],
    ),
    "UltraInteract": ([{"trajectory": [{"from": "user", "value": Q}], "chosen": ONE, "rejected": TWO}], {}, [A_FIRST]),
    "SHP, other prompt": (
        [{"history": "x", "title": Q, "human_ref_A": ONE, "human_ref_B": TWO, "labels": 1}],
        {"columns": {"prompt": "title"}},
        [A_FIRST],
    ),
    "Capybara": (
        [
            {
                "conversation": [{"input": Q, "output": ONE}],
                "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": ONE}],
                "rejected": [{"role": "user", "content": Q}, {"role": "assistant", "content": TWO}],
            }
        ],
        {},
        [A_FIRST],
    ),
    "a system turn in the prompt of whole dialogues": (
        [
            {
                "prompt": [{"role": "system", "content": "Be brief."}],
                "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": ONE}],
                "rejected": [{"role": "user", "content": Q}, {"role": "assistant", "content": TWO}],
            }
        ],
        {},
        [[f"s:Be brief. / u:{Q}", *A_FIRST[1:]]],
    ),
    "the preference named beside chosen and rejected": (
        [two("B", chosen=ONE, rejected=TWO)],
        {"columns": {"preference": "preference"}},
        [B_FIRST],
    ),
    # the question in several columns
    "AlpacaFarm": (
        [
            {"instruction": "Which is", "input": "larger?", "output_1": ONE, "output_2": TWO, "preference": 2},
            {"instruction": Q, "input": "", "output_1": ONE, "output_2": TWO, "preference": 1},
        ],
        {},
        [["u:Which is\nlarger?", f"a:{TWO}", f"a:{ONE}"], A_FIRST],
    ),
    "history": (
        [
            {
                "instruction": Q,
                "input": "",
                "history": [["Hi", "Yes?"]],
                "system": "Be brief.",
                "chosen": ONE,
                "rejected": TWO,
            }
        ],
        {},
        [[f"s:Be brief. / u:Hi / a:Yes? / u:{Q}", f"a:{ONE}", f"a:{TWO}"]],
    ),
    "history that the dialogues hold already": (
        [{"history": [["Hi", "Yes?"]], "chosen": LONGER[0], "rejected": LONGER[1]}],
        {},
        [[f"u:Hi / a:Yes? / u:{Q}", *A_FIRST[1:]]],
    ),
    "history that the prompt holds already": (
        [PAIR | {"system": "Be brief.", "history": LONGER[0][:2], "prompt": LONGER[0][:3]}],
        {},
        [[f"s:Be brief. / u:Hi / a:Yes? / u:{Q}", *A_FIRST[1:]]],
    ),
    "an empty system beside another name for it": (
        [PAIR | {"system": "", "system_prompt": "Be brief."}, PAIR | {"system": None, "system_prompt": "Be kind."}],
        {},
        [[f"s:Be brief. / u:{Q}", *A_FIRST[1:]], [f"s:Be kind. / u:{Q}", *A_FIRST[1:]]],
    ),
    "both parts of the question beside completions": (
        [
            {
                "instruction": "Which is",
                "input": "larger?",
                "completions": [{"response": TWO, "overall_score": 1}, {"response": ONE, "overall_score": 2}],
            }
        ],
        {},
        [["u:Which is\nlarger?", *A_FIRST[1:]]],
    ),
    "both parts of the question beside generations": (
        [{"instruction": "Which is", "input": "larger?", "generations": [TWO, ONE], "ratings": [1, 5]}],
        {},
        [["u:Which is\nlarger?", *A_FIRST[1:]]],
    ),
    "system as an object": (
        [{"system": {"role": "system", "content": "Be brief."}, "question": Q, "chosen": ONE, "rejected": TWO}],
        {},
        [[f"s:Be brief. / u:{Q}", f"a:{ONE}", f"a:{TWO}"]],
    ),
    "joined on request": (
        [{"question": Q, "context": "Numbers.", "chosen": ONE, "rejected": TWO}],
        {"columns": {"prompt": ["context", "question"]}},
        [[f"u:Numbers.\n{Q}", f"a:{ONE}", f"a:{TWO}"]],
    ),
    # dialogue marks and JSON in cells
    "one newline": (
        [{"chosen": f"Human: {Q}\nAssistant: {ONE}", "rejected": f"Human: {Q}\nAssistant: {TWO}"}],
        {},
        [A_FIRST],
    ),
    "a plain prompt beside whole dialogues": (
        [
            {
                "prompt": Q,
                "chosen": f"\n\nHuman: {Q}\n\nAssistant: {ONE}",
                "rejected": f"\n\nHuman: {Q}\n\nAssistant: {TWO}",
            }
        ],
        {},
        [A_FIRST],
    ),
    "the mark in the answers": (
        [{"prompt": f"\n\nHuman: {Q}", "chosen": f"\n\nAssistant: {ONE}", "rejected": f"Assistant: {TWO}"}],
        {},
        [A_FIRST],
    ),
    "Vicuna": (
        [{"prompt": f"A chat between a user and an assistant. USER: {Q} ASSISTANT:", "chosen": ONE, "rejected": TWO}],
        {},
        [[f"s:A chat between a user and an assistant. / u:{Q}", f"a:{ONE}", f"a:{TWO}"]],
    ),
    "JSON with other keys first": (
        [{"prompt": json.dumps([{"id": 1, "role": "user", "content": Q}]), "chosen": ONE, "rejected": TWO}],
        {},
        [A_FIRST],
    ),
    "JSON lists of one turn": (
        [{"prompt": json.dumps([Q]), "chosen": json.dumps([ONE]), "rejected": json.dumps([TWO])}],
        {},
        [A_FIRST],
    ),
    "NeMo-RL": (
        [
            {
                "context": [{"role": "user", "content": Q}],
                "completions": [
                    {"rank": 1, "completion": [{"role": "assistant", "content": TWO}]},
                    {"rank": 0, "completion": [{"role": "assistant", "content": ONE}]},
                ],
            }
        ],
        {},
        [A_FIRST],
    ),
    "a bar in the names of columns": (
        [{"Prompt": Q, "Model 1 | Output": ONE, "Model 2 | Output": TWO, "Model 1": "no", "winner": 1}],
        {"columns": {"a": "Model 1 | Output", "b": "Model 2 | Output"}, "wins": {1: "first"}},
        [A_FIRST],
    ),
    "ranks in a list of their own": (
        [{"instruction": Q, "completions": [TWO, ONE], "ranks": [2, 1]}],
        {},
        [A_FIRST],
    ),
    "a truth value for each answer": (
        [two(False, a_wins=True, b_wins=False) | {"preference": None}],
        {"scores": ("a_wins", "b_wins")},
        [A_FIRST],
    ),
    "no picture": ([PAIR | {"image": {"bytes": None, "path": None}}], {}, [A_FIRST]),
    "a text beside an empty content": (
        [PAIR | {"chosen": [{"role": "assistant", "content": "", "text": ONE}]}],
        {},
        [A_FIRST],
    ),
    "a system turn before Anthropic's marks": (
        [PAIR | {"prompt": f"Be nice.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {Q}\n\nAssistant:"}],
        {},
        [[f"s:Be nice. / u:Hi / a:Yes? / u:{Q}", *A_FIRST[1:]]],
    ),
    **{
        f"{name}, stripped": ([PAIR | {"prompt": (begin + Q + end).strip()}], {}, [A_FIRST])
        for name, begin, end in (
            ("ChatML", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
            ("Gemma", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
            ("Seed-OSS", "<seed:bos>user\n", "<seed:eos><seed:bos>assistant\n"),
            ("Llama 4", "<|header_start|>user<|header_end|>\n\n", "<|eot|><|header_start|>assistant<|header_end|>\n\n"),
            ("Kimi", "<|im_user|>user<|im_middle|>", "<|im_end|><|im_assistant|>assistant<|im_middle|>"),
        )
    },
    "an object with messages": (
        [{"prompt": json.dumps({"messages": [{"role": "user", "content": Q}]}), "chosen": ONE, "rejected": TWO}],
        {},
        [A_FIRST],
    ),
    "an answer that is JSON": (
        [{"prompt": Q, "chosen": '["a", "b"]', "rejected": '{"value": 2}'}],
        {},
        [[f"u:{Q}", 'a:["a", "b"]', 'a:{"value": 2}']],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_public_format_is_read(name, capsys):
    rows, arguments, wanted = READ[name]
    pairs = load_pairs(rows, **arguments)
    assert [plain(row) for row in pairs] == wanted
    accounted(pairs, len(rows))


STRENGTH = two(3, ONE_TWO, "preference_strength")
QUESTIONS = {
    **{
        f"a strength, and {name}": ([STRENGTH | {name: "response_1"}], rf"'preference_strength', '{name}'")
        for name in ("chosen", "selected_response", "best", "preferred_response_index")
    },
    "a choice and a better response": (
        [two("A", column="choice", preferred_response="response_b")],
        "'choice', 'preferred_response'",
    ),
    **{
        f"an answer and an {name}": (
            [{"prompt": Q, "response": "old", name: ONE, "rejected_response": TWO}],
            rf"'response', 'rejected_response' or in '{name}'",
        )
        for name in ("accepted_response", "corrected_response", "preferred output")
    },
    **{
        f"{value} for a tie": ([two(first), two(value)], r"say of each value(?!.*first_wins)")
        for first, value in (("A更好", "平局"), ("primera", "empate"), ("erste", "unentschieden"), (-1, 0), (1, 3))
    },
    "truth values": ([two(True)], r"True \(1\)"),
    "0 and 1 for a and b": ([two(0), two(1)], r"0 \(1\), 1 \(1\)"),
    "1 and 2 for a and b": ([two(1), two(2)], r"1 \(1\), 2 \(1\)"),
    "a label of 0 and 1": ([two(v, ("answer_0", "answer_1"), "label") for v in (0, 1)], r"'label' holds 0 \(1\)"),
    "1 and nothing else": ([two(1, ONE_TWO)] * 2, r"'preference' holds 1 \(2\)"),
    "not A": ([two(v) for v in ("!A", "-A", "A != B", "A-")], r"'!A': .*'-A': .*'A != B': .*'A-': \.\.\."),
    "a half": ([two(v, ("answer_0", "answer_1")) for v in (0, 0.5, 1)], r"0.5 \(1\)"),
    "part of a scale": ([two(v, ONE_TWO) for v in (-2, -1)], r"-2 \(1\), -1 \(1\)"),
    "last word only": ([two("not sure about B")], r"'not sure about B': \.\.\."),
    "a name that ends in a number": ([two("Llama 2", ONE_TWO, "winner")], r"'Llama 2'"),
    "lists": ([two([1, 2])], r"\[1, 2\]"),
    "two words and a name": ([two("a", model_a="x", model_b="a")], r"'a' \(1\)"),
    "two families of answers": ([two("A") | {"answer_1": "x", "answer_2": "y"}], r"two sets of answers"),
    "chosen and rejected that name an answer": (
        [two("x", ("response_0", "response_1"), "id", chosen="response_1", rejected="response_0")],
        r"'chosen', 'rejected' or in 'response_0', 'response_1'",
    ),
    "two preferences": ([two("A", winner="B")], r"'preference', 'winner'"),
    "names in two cases": ([{"Prompt": Q, "PROMPT": Q, "chosen": ONE, "rejected": TWO}], r"'Prompt', 'PROMPT'"),
    "question and context": ([{"query": Q, "context": "x", "chosen": ONE, "rejected": TWO}], r"'query', 'context'"),
    "another column in another row": (
        [{"prompt": Q, "chosen": ONE, "rejected": TWO}, {"context": Q, "chosen": ONE, "rejected": TWO}],
        r"another column in another row",
    ),
    "two families of chosen and rejected": (
        [{"prompt": Q, "chosen": "gpt-4", "rejected": "llama", "chosen_response": ONE, "rejected_response": TWO}],
        r"'chosen', 'rejected' or in 'chosen_response', 'rejected_response'.*columns=\{'chosen': ",
    ),
    "a model's name beside the chosen answer": (
        [{"prompt": Q, "chosen": "gpt-4", "chosen_response": ONE, "rejected_response": TWO}],
        r"'chosen', 'rejected_response' or in 'chosen_response'",
    ),
    "a flag beside the rejected answer": (
        [{"prompt": Q, "chosen_response": ONE, "rejected_response": TWO, "rejected": "False"}],
        r"'chosen_response', 'rejected' or in 'rejected_response'",
    ),
    "a letter beside chosen and rejected": (
        [{"prompt": Q, "chosen_response": ONE, "rejected_response": TWO, "preferred": "A"}],
        r"'preferred', 'rejected_response' or in 'chosen_response'",
    ),
    "a preference beside its strength (HelpSteer2)": (
        [two(3, ONE_TWO, "preference_strength", preference="Response 1")],
        r"'preference_strength', 'preference'.*columns=\{'preference': ",
    ),
    "a winner beside WebGPT's scores": (
        [{"question": Q, "answer_0": ONE, "answer_1": TWO, "score_0": 0.9, "score_1": 0.1, "winner": "answer_1"}],
        r"'score_0', 'score_1', 'winner'",
    ),
    "two system turns": ([PAIR | {"system": "S1", "system_prompt": "S2"}], r"'system', 'system_prompt'.*'system': "),
    "MT-Bench without its number": ([MT_BENCH], r"turn 1 is about the first answer"),
    "a winner that is not among the two": (
        [two("x", column="winner", model_a="x", model_b="y"), two("x", column="winner", model_a="y", model_b="z")],
        r"'winner' holds 'x' \(2\). .* also in 'model_a', so that wins=\{'x': \.\.\.\} would name one side",
    ),
    "a winner in columns of other names": (
        [two(*v, column="winner", left="x", right="y") for v in (("x",), ("y",))],
        r"also in 'left', 'right'",
    ),
    "a word and a name that say different things": (
        [two("model_b", ONE_TWO[::-1], "winner", model_a="model_b", model_b="x")],
        r"'winner' holds 'model_b'",
    ),
    "a third value of a known format": (
        [{"history": Q, "human_ref_A": ONE, "human_ref_B": TWO, "labels": v} for v in (1, -1)],
        r"it is not certain which answer is better. Column 'labels' holds 1 \(1\), -1 \(1\)",
    ),
    "a letter that stands for the better answer": (
        [two("a", column="better_response")],
        r"'response_a', 'response_b' are two answers.*columns=\{'preference': ",
    ),
    "scores without a preference": (
        [two(7, column="score_a", score_b=8)],
        r"columns=\{'preference': .*scores=\('score_a', 'score_b'\)",
    ),
    "Argilla's ranks, one of them missing": (
        [two([{"value": {"rank": [1, None], "value": list(ANSWERS)}}], ANSWERS)],
        r"'preference' holds",
    ),
    "KTO": ([{"prompt": Q, "completion": ONE, "label": True}], r"KTO"),
    "one rated answer": ([{"prompt": Q, "response": ONE, "helpfulness": 4, "correctness": 4}], r"two answers"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_is_not_certain_is_asked(name):
    rows, words = QUESTIONS[name]
    with pytest.raises(UserError, match=f"(?s){words}"):
        load_pairs(rows)


MISUSED = {
    "two values of one key": ({"wins": {"A": "first", "a": "second"}}, "two things of 'a'"),
    "a rule that says two things": ({"wins": "1 first, < 3 second"}, r"wins= does not say"),
    "wins as a list": ({"wins": ["A", "B"]}, r"wins= is \{value"),
    "wins and scores": ({"wins": {"A": "first"}, "scores": ("s", "t")}, "wins= and scores="),
    "one score": ({"scores": "s"}, "scores= is two columns"),
    "chosen with a preference": (
        {"columns": {"chosen": "response_a", "preference": "winner"}},
        "or a, b and preference",
    ),
    "no dictionary": ({"columns": "prompt"}, "columns= has the key 'prompt'"),
    "scores that are no names": ({"scores": (1, 2)}, r"not \(1, 2\)"),
    "scores that are a number": ({"scores": 5}, "not 5"),
    "a column twice": ({"columns": {"a": "response_a", "b": "response_a"}}, "'response_a' would be read twice"),
    "a list for an answer": ({"columns": {"chosen": ["response_a"]}}, "name of a column"),
    "columns as a list": ({"columns": ["prompt"]}, "Its keys are ours"),
    "first, exchanged": ({"columns": {"a": "response_b", "b": "response_a", "preference": "place"}}, "'place' holds"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_arguments_that_cannot_be_meant_are_refused(name):
    arguments, words = MISUSED[name]
    with pytest.raises(UserError, match=f"(?s){words}"):
        load_pairs([two(1, place="first", s=1, t=2)], **arguments)


def test_wins_without_a_preference_is_refused():
    with pytest.raises(UserError, match="none is read"):
        load_pairs([{"prompt": Q, "chosen": ONE, "rejected": TWO}], first_wins=1)


# Texts that are no answers: they name two, of which other cells of the row tell.
NAMES = {
    "letters": ("A", "B", {"summary_a": ONE, "summary_b": TWO}),
    "names": ("Assistant A", "assistant_b", {"assistant_a": ONE, "assistant_b": TWO}),
    "numbers": ("1", "2", {"text1": ONE, "text2": TWO}),
    "beginnings": ("model_x", "model_y", {"model_x_answer": ONE, "model_y_answer": TWO}),
    "capitals": ("b", "a", {"optionA": ONE, "optionB": TWO}),
    "keys": ("gpt-4", "llama-2", {"responses": {"gpt-4": ONE, "llama-2": TWO}}),
    "keys in JSON": ("A", "B", {"candidates": json.dumps({"A": ONE, "B": TWO})}),
    "ids": ("c-2", "c-1", {"completions": [{"completion_id": "c-1", "text": ONE}, {"completion_id": "c-2"}]}),
    "places from 0": ("1", "0", {"responses": [ONE, TWO]}),
    "places from 1": ("1", "2", {"responses": json.dumps([{"text": ONE}, {"text": TWO}])}),
    "models in other columns": ("gpt-4", "llama", {"text1": ONE, "model1": "gpt-4", "text2": TWO, "model2": "llama"}),
    "numbers that are no texts": (1, 2, {"responses": [ONE, TWO]}),
    "texts of their own": ("gpt-4", "llama", {"chosen_text": ONE, "rejected_text": TWO}),
    "texts with capitals": ("gpt-4", "llama", {"Chosen Response": ONE, "rejectedResponse": TWO}),
    "a list of models": ("gpt-4", "llama", {"models": ["gpt-4", "llama"], "responses": [ONE, TWO]}),
    "uuids": ("9f-11", "77-22", {"completions": [{"uuid": "9f-11", "text": ONE}, {"uuid": "77-22", "text": TWO}]}),
    "sources": ("gpt-4", "llama", {"responses": [{"source": "gpt-4", "text": ONE}, {"source": "llama"}]}),
    "letters of numbers": ("A", "B", {"text_1": ONE, "text_2": TWO}),
    "first and second of letters": ("first", "second", {"text_a": ONE, "text_b": TWO}),
    "flags of one answer": ("1", "0", {"response": ONE}),
    "truth values of one answer": (False, True, {"completion": ONE}),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_an_answer_is_no_answer(name):
    chosen, rejected, others = NAMES[name]
    rows = [{"prompt": Q, "chosen": chosen, "rejected": rejected, **others}] * 2
    with pytest.raises(UserError, match=rf"2 left out: chosen and rejected name .*\({chosen}, {rejected}\).*columns="):
        load_pairs(rows)


@pytest.mark.parametrize(
    "column", ["least_preferred", "inferior_response", "not_preferred", "\u8f83\u5dee\u56de\u7b54"]
)
def test_a_column_that_names_the_worse_answer_is_asked_about(column):
    with pytest.raises(UserError, match=rf"'{column}' holds 'A' \(1\).*'A': \.\.\."):
        load_pairs([two("A", column=column)], columns={"preference": column})
    for other in ("harmlessness_preference", "closer_answer"):
        assert load_pairs([two("A", column=other)], columns={"preference": other})


@pytest.mark.parametrize(
    "columns, scores, words",
    [
        (None, ("rank_a", "rank_b"), "'rank_a', 'rank_b' 1 or the lowest may be the best"),
        (None, ("score_b", "score_a"), "the other way round"),
        ({"a": "response_b", "b": "response_a"}, ("score_a", "score_b"), "the other way round"),
    ],
)
def test_scores_that_cannot_be_meant_are_refused(columns, scores, words):
    with pytest.raises(UserError, match=words):
        load_pairs([two(None, rank_a=1, rank_b=2, score_a=5, score_b=3)], columns=columns, scores=scores)


BY_ONE = {"model_a": "gpt-4", "model_b": "gpt-4"}
LEFT_RIGHT = {"helpful": "left", "harmless": "right"}
LEFT_OUT = {
    "a prompt that is longer than the question in the dialogues": (
        {"prompt": f"Passage: the cat sat.\n\n{Q}", "chosen": WHOLE[0], "rejected": WHOLE[1]},
        "prompt is not in the two dialogues",
    ),
    "scores in words": ({**two("A"), "score_a": "8,5", "score_b": "9/10"}, "no score in score_a: '8,5'"),
    "ratings in lists": (
        {"instruction": Q, "generations": [ONE, TWO], "ratings": [[5], [3]]},
        r"fewer than two answers with a score \(ratings: \[\[5\], \[3\]\]\)",
    ),
    "ranks and scores that say different things": (
        {
            "instruction": Q,
            "completions": [{"response": ONE, "rank": 1, "score": 0.1}, {"response": TWO, "rank": 2, "score": 0.9}],
        },
        "score and rank of completions say different things",
    ),
    "scores that are no ranks": (
        {"prompt": Q, "answers": [{"text": ONE, "score": 3}, {"text": TWO, "score": 9}]},
        r"with a score \(rank: \[None, None\]\)",
    ),
    "votes on several questions": (
        {
            "data": {"prompt": Q, "answer1": ONE, "answer2": TWO},
            "annotations": [
                {"result": [{"from_name": name, "value": {"selected": side}} for name, side in LEFT_RIGHT.items()]}
            ],
        },
        r"votes on several questions \(harmless, helpful\)",
    ),
    "a winner that wrote both answers": (two("gpt-4", column="winner") | BY_ONE, "no preference: gpt-4"),
    "an instruction beside its input": (
        PAIR | {"prompt": {"instruction": "Translate", "input": "cat"}},
        "prompt .*instruction",
    ),
    "a context beside messages": (
        PAIR | {"prompt": {"messages": [{"role": "user", "content": Q}], "context": "A passage."}},
        "prompt has context beside its messages",
    ),
    "a system turn of another name": (
        PAIR | {"prompt": {"messages": [{"role": "user", "content": Q}], "system_prompt": "Be brief."}},
        "prompt has system_prompt beside its messages",
    ),
    "a picture in a message": (
        PAIR | {"prompt": [{"role": "user", "content": Q, "images": ["a.png"]}]},
        "has images beside its text",
    ),
    "calls in a key of their own": (
        PAIR | {"chosen": [{"role": "assistant", "content": "I look.", "function_calls": "s(q='x')"}]},
        "has function_calls beside its text",
    ),
    "an open turn of the history": (PAIR | {"history": [["Hi", "Yes?"], [Q, ""]]}, "an entry of history is not"),
    "the names once more": ({name: name for name in PAIR}, "repeats the names"),
    "a whole talk beside its two answers": (
        {"messages": WHOLE[0], "chosen_response": ONE, "rejected_response": TWO},
        "the prompt ends with a turn of the assistant",
    ),
    "a turn without text": (
        {
            "prompt": '["Q1", "Q2"]',
            "response_a": '["a", null]',
            "response_b": '["b", "c"]',
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        "a turn without text",
    ),
    "a prompt that is not in the dialogues": (
        {
            "prompt": "Another question",
            "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": ONE}],
            "rejected": [{"role": "user", "content": Q}, {"role": "assistant", "content": TWO}],
        },
        "prompt is not in the two dialogues",
    ),
    "a history with nothing": (
        {"question": Q, "history": [["Hi", None]], "chosen": ONE, "rejected": TWO},
        "entry of history",
    ),
    "a system turn that is a number": (
        {"system": 3, "prompt": Q, "chosen": ONE, "rejected": TWO},
        "system is a number",
    ),
    "fewer ratings than answers": (
        {"instruction": Q, "generations": [ONE, TWO, "x"], "ratings": [1, 2]},
        "generations and ratings have different lengths",
    ),
    "a discarded vote": (
        {
            "instruction": Q,
            "response1": ONE,
            "response2": TWO,
            "preference.responses": ["response2"],
            "preference.responses.status": ["discarded"],
        },
        "draft, discarded or cancelled",
    ),
    "a cancelled vote": (
        {
            "data": {"prompt": Q, "answer1": ONE, "answer2": TWO},
            "annotations": [{"was_cancelled": True, "result": [{"value": {"selected": "left"}}]}],
        },
        "draft, discarded or cancelled",
    ),
    "videos": ({"prompt": Q, "chosen": ONE, "rejected": TWO, "videos": ["a.mp4"]}, "videos"),
    "a score that is no number": ({**two("A"), "score_a": "7%", "score_b": "3%"}, "no score"),
    "answers as Python writes them": (
        {"instruction": Q, "completions": "[{'response': 'x'}]"},
        "is a text, not a list",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_can_be_read_in_two_ways_is_left_out_by_name(name):
    row, words = LEFT_OUT[name]
    with pytest.raises(UserError, match=f"1 left out: .*{words}"):
        load_pairs([row], scores=("score_a", "score_b") if "score_a" in row else None)


@pytest.mark.parametrize(
    "wins, words",
    [
        ({1: "first"}, r"wins= does not say.*2: \.\.\."),
        ({1: "first", 2: "B"}, "'B'"),
        ("1 is first", "no rule"),
        ("1 first, 3 second", r"2: \.\.\."),
    ],
)
def test_wins_covers_every_value_or_is_refused(wins, words):
    with pytest.raises(UserError, match=f"(?s){words}"):
        load_pairs([two(1), two(2)], wins=wins)


def test_the_reading_is_printed_and_kept(capsys):
    rows = [two(value, ("output_1", "output_2"), annotator="x", source="y") for value in (1, 1, 2, 3)]
    pairs = load_pairs(rows, wins={1: "first", 2: "second", 3: "tie"})
    reading = [
        "list: 4 rows. prompt <- prompt; chosen/rejected <- output_1, output_2 by preference",
        "preference: 1 -> output_1 (2), 2 -> output_2 (1), 3 -> tie, left out (1)",
        "not read: 'annotator', 'source'",
    ]
    assert load_report(pairs).reading == reading
    assert capsys.readouterr().out.splitlines()[:3] == reading
    load_pairs([{"prompt": Q, "chosen": ONE, "rejected": TWO}])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("column", ["swapped", "is_chosen_better", "chosen_rank", "label"])
def test_a_number_that_may_say_that_the_two_are_exchanged_is_named(column, capsys):
    load_pairs([PAIR | {column: 1}])
    assert f"not read: '{column}'" in capsys.readouterr().out


def test_the_reading_names_what_a_format_has(capsys):
    load_pairs(READ["Label Studio"][0])
    assert capsys.readouterr().out.splitlines() == [
        "list: 1 row, read as Label Studio, pairwise. prompt <- data.prompt; "
        "chosen/rejected <- data.answer1, data.answer2 by annotations.result.value.selected",
        "annotations.result.value.selected: majority -> data.answer2 (1)",
    ]
    load_pairs(READ["UltraFeedback"][0])
    assert "completions by overall_score" in capsys.readouterr().out


def test_ranked_answers_best_against_worst_or_all():
    row = {"prompt": Q, "answers": [{"answer": str(rank), "rank": rank} for rank in (3, 1, 2)]}
    assert [plain(pair)[1:] for pair in load_pairs([row])] == [["a:1", "a:3"]]
    every = load_pairs([row], ranked="all")
    assert [plain(pair)[1:] for pair in every] == [["a:1", "a:2"], ["a:1", "a:3"], ["a:2", "a:3"]]
    assert (load_report(every).rows, load_report(every).pairs, load_report(every).left_out) == (1, 3, {})


def test_calls_of_tools_and_reasoning_are_kept_whole():
    call = {"id": "1", "type": "function", "function": {"name": "find", "parameters": '{"what": "map"}'}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    good = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "none"},
        {"role": "assistant", "content": ONE, "reasoning": "10 > 2"},
    ]
    rows = [{"prompt": Q, "chosen": good, "rejected": TWO, "tools": json.dumps(tools)}]
    pairs = load_pairs(rows)
    asked, answer, last = pairs[0]["chosen"]
    assert asked["tool_calls"][0]["function"] == {"name": "find", "arguments": {"what": "map"}}
    assert asked["tool_calls"][0]["id"] == "1"
    assert (asked["content"], answer["role"], answer["tool_call_id"]) == ("", "tool", "1")
    assert last == {"role": "assistant", "content": ONE, "reasoning_content": "10 > 2"}
    assert pairs[0]["tools"] == tools
    older = {"from": "function_call", "value": '{"name": "find", "arguments": {}}'}
    rows[0]["chosen"] = [older, {"from": "observation", "value": "none"}, {"from": "gpt", "value": ONE}]
    assert load_pairs(rows)[0]["chosen"][0]["tool_calls"][0]["function"]["name"] == "find"


@pytest.mark.parametrize("where", ["When2Call", "DiaTool", "texts"])
def test_tools_are_kept_wherever_they_stand(where):
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    row = {"tools": [json.dumps(tool)], "messages": WHOLE[0][:1], "chosen_response": ONE, "rejected_response": TWO}
    if where != "When2Call":
        sides = [{"messages": side, "tools": [tool]} for side in WHOLE]
        row = dict(zip(("chosen", "rejected"), sides if where == "DiaTool" else map(json.dumps, sides), strict=True))
    (pair,) = load_pairs([row])
    assert (plain(pair), pair["tools"]) == (A_FIRST, [tool])


def test_messages_stay_short_with_very_many_columns(capsys):
    wide = {f"column_{place}": "x" for place in range(3000)}
    with pytest.raises(UserError) as caught:
        load_pairs([wide])
    assert len(str(caught.value)) < 1500 and "2980 more" in str(caught.value)
    rows = [{"prompt": Q, "chosen": ONE, "rejected": [{"role": f"r{n}", "content": "x"}]} for n in range(200)]
    load_pairs([*rows, {"prompt": Q, "chosen": ONE, "rejected": TWO}])
    assert len(capsys.readouterr().out) < 4000


def test_two_system_turns_that_differ_are_left_out_by_name():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": Q}]
    rows = [
        {"system": text, "prompt": prompt, "chosen": ONE, "rejected": TWO} for text in ("Be brief.", "Be long.", "")
    ]
    pairs = load_pairs(rows)
    assert [plain(row)[0] for row in pairs] == [f"s:Be brief. / u:{Q}"] * 2
    assert "two system turns" in next(iter(load_report(pairs).left_out))


def test_a_row_with_images_is_left_out_by_name():
    rows = [{"prompt": "<image> What is it?", "chosen": ONE, "rejected": TWO, "images": ["a.png"]}]
    rows.append({"prompt": Q, "chosen": ONE, "rejected": TWO})
    assert "images" in next(iter(load_report(load_pairs(rows)).left_out))


def test_the_help_lists_the_formats():
    assert all(f"- {entry['name']}: {', '.join(entry['columns'])}" in load_pairs.__doc__ for entry in FORMATS)


VALUES = st.sampled_from(["A", "B", "tie", "", None, "response_a", "model_b", "A > B", "B-is-better", "neither"])
OTHER = {
    "A": "B",
    "B": "A",
    "response_a": "response_b",
    "model_b": "model_a",
    "A > B": "B > A",
    "B-is-better": "A-is-better",
}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20).map("It is {}".format)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT, VALUES), min_size=1, max_size=6))
def test_exchanging_the_answers_and_their_preference_changes_nothing(rows):
    rows = [*rows, (Q, ONE, TWO, "A")]
    straight = [{"prompt": q, "response_a": a, "response_b": b, "winner": v} for q, a, b, v in rows]
    crossed = [{"prompt": q, "response_a": b, "response_b": a, "winner": OTHER.get(v, v)} for q, a, b, v in rows]
    pairs = load_pairs(straight)
    assert [plain(row) for row in pairs] == [plain(row) for row in load_pairs(crossed)]
    accounted(pairs, len(rows))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_a_rule_and_its_mirror_give_the_same_pairs(values):
    rows = [{"prompt": f"{Q} {n}", "answer_0": ONE, "answer_1": TWO, "label": v} for n, v in enumerate([*values, 1])]
    mirrored = [{**row, "answer_0": TWO, "answer_1": ONE, "label": -row["label"]} for row in rows]
    rule = "< 0 first, 0 tie, > 0 second"
    pairs = load_pairs(rows, wins=rule)
    assert [plain(row) for row in pairs] == [plain(row) for row in load_pairs(mirrored, wins=rule)]
    accounted(pairs, len(rows))


# Before the question, between question and answer, after the answer.
SPELLED = {
    "Human in lines": ("Human: ", "\nAssistant: ", ""),
    "Anthropic": ("\n\nHuman: ", "\n\nAssistant: ", ""),
    "Open Assistant": ("<|prompter|>", "<|endoftext|><|assistant|>", "<|endoftext|>"),
    "ChatML": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "Llama 2": ("<s>[INST] ", " [/INST] ", " </s>"),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Gemma": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
    "Zephyr": ("<|system|>\n</s>\n<|user|>\n", "</s>\n<|assistant|>\n", "</s>"),
    "DeepSeek": ("<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "DeepSeek in words": ("User: ", "\n\nAssistant: ", "<｜end▁of▁sentence｜>"),
    "Alpaca": ("### Instruction:\n", "\n\n### Response:\n", ""),
    "Guanaco in one line": ("### Human: ", "### Assistant: ", ""),
    "Vicuna": ("USER: ", " ASSISTANT: ", "</s>"),
    "bot": ("User: ", "\nBot: ", ""),
    "Q and A": ("Q: ", "\nA: ", ""),
    "brackets": ("[USER] ", "\n[ASSISTANT] ", ""),
    "ChatGLM": ("[Round 1]\n\n问：", "\n\n答：", ""),
    "HelpSteer": ("<extra_id_0>System\n\n<extra_id_1>User\n", "\n<extra_id_1>Assistant\n", "\n<extra_id_1>"),
    "Command R": (
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "gpt-oss": ("<|start|>user<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    "Granite": (
        "<|start_of_role|>user<|end_of_role|>",
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>",
    ),
    "OpenChat": ("GPT4 Correct User: ", "<|end_of_turn|>GPT4 Correct Assistant: ", "<|end_of_turn|>"),
    "Baichuan": ("<reserved_106>", "<reserved_107>", ""),
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize(
    "where", ["prompt", "answers beside a question", "answers alone", "all three", "each its mark"]
)
def test_marks_of_turns_are_read_wherever_they_stand(name, where, capsys):
    before, between, after = SPELLED[name]
    asked, answers = f"{before}{Q}{between}", [f"{ONE}{after}", f"{TWO}{after}"]
    chosen, rejected = answers if where == "prompt" else [f"{asked}{answer}" for answer in answers]
    row = {"prompt": asked, "chosen": chosen, "rejected": rejected}
    if where == "answers beside a question":
        row["prompt"] = Q
    elif where == "answers alone":
        del row["prompt"]
    elif where == "each its mark":
        row = {"prompt": f"{before}{Q}", "chosen": f"{between}{answers[0]}", "rejected": f"{between}{answers[1]}"}
    assert [plain(pair) for pair in load_pairs([row])] == [A_FIRST]
    assert ("turns <- marks in the texts" in capsys.readouterr().out) == (name != "Anthropic")


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("Write a talk.", "Human: Hi.\nAssistant: Yes?", "Human: Go.\nAssistant: No."),  # of other questions
        (Q, f"Human: {Q}\nAssistant: {ONE}", TWO),  # one of the two alone
        (Q, f"Assistant: {ONE}", f"Assistant: {TWO}"),
        (f"Question: {Q}\nAnswer: It is", ONE, TWO),  # the answer is begun
        ("Question: Which?\nA: red\nB: blue", ONE, TWO),
    ],
)
def test_prose_that_looks_like_marks_stays_text(prompt, chosen, rejected):
    assert [plain(pair) for pair in load_pairs([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])] == [
        [f"u:{prompt}", f"a:{chosen}", f"a:{rejected}"]
    ]


def test_marks_in_one_answer_alone_are_no_pair():
    rows = [{"prompt": Q, "chosen": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{ONE}", "rejected": TWO}]
    with pytest.raises(UserError, match="only one of the two answers is a whole dialogue"):
        load_pairs(rows)


ORDINARY = {
    "scores beside": ({"instruction": "q", "completions": ["good", "bad"], "score": [9, 3]}, "good", "bad"),
    "overall scores": ({"instruction": "q", "completions": ["good", "bad"], "overall_score": [3, 9]}, "bad", "good"),
    "an embedding": ({"prompt": "q", "chosen": "36", "rejected": "35", "embedding": [0.1] * 40}, "36", "35"),
    "tags": ({"prompt": "q", "chosen": "2", "rejected": "3", "tags": ["math", "easy", "short"]}, "2", "3"),
    "votes": ({"prompt": "q", "chosen": "yes", "rejected": "no", "votes": {"yes": 9, "no": 1}}, "yes", "no"),
    "labels": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "chosen_label": "good", "rejected_label": "bad"},
        "good",
        "bad",
    ),
    "a statement that is judged": (
        {"query": "q", "response": "True", "rejected_response": "False"},
        "True",
        "False",
    ),
    "a text that is judged": (
        {"prompt": "q", "chosen": "True", "rejected": "False", "text": "A passage.", "answer": "True"},
        "True",
        "False",
    ),
    "answers to choose from": (
        {"prompt": "q", "A": "1", "B": "2", "C": "3", "D": "4", "chosen": "3", "rejected": "4"},
        "3",
        "4",
    ),
    "letters of options": ({"prompt": "q", "option_1": "x", "option_2": "y", "chosen": "A", "rejected": "B"}, "A", "B"),
    "what was taken out of the answers": (
        {"prompt": "q", "chosen": "It is 42.", "rejected": "It is 41.", "chosen_answer": "42", "rejected_answer": "41"},
        "It is 42.",
        "It is 41.",
    ),
    "planets": (
        {"prompt": "q", "chosen": "Mars", "rejected": "Venus", "planet_names": ["Mars", "Venus"], "radius": [1, 2]},
        "Mars",
        "Venus",
    ),
    "a source": ({"prompt": "q", "chosen": "Yes", "rejected": "No", "source": "yes_no"}, "Yes", "No"),
    "a choice of tools": (two("A", column="winner", tool_choice="auto", best_answer="Some text."), ONE, TWO),
    "two verdicts that agree": (two("A", column="choice", preferred_response="response_a"), ONE, TWO),
    "UltraFeedback with a context": (
        {
            "instruction": "q",
            "context": None,
            "completions": [{"response": "good", "overall_score": 9}, {"response": "bad", "overall_score": 2}],
        },
        "good",
        "bad",
    ),
    "a prompt to mend": (
        PAIR | {"chosen": "Mend this:\n\nHuman: {question}\n\nAssistant:"},
        "Mend this:\n\nHuman: {question}\n\nAssistant:",
        TWO,
    ),
    "a mark as the answer": (
        PAIR | {"chosen": "<|im_start|>user", "rejected": "<|im_start|>assistant"},
        "<|im_start|>user",
        "<|im_start|>assistant",
    ),
    "no pictures in a message": (
        PAIR | {"prompt": [{"role": "user", "content": Q, "images": [None], "attachments": "[]"}]},
        ONE,
        TWO,
    ),
    "a comment beside a vote": (
        {
            "data": {"prompt": Q, "answer1": ONE, "answer2": TWO},
            "annotations": [
                {
                    "result": [
                        {"from_name": "pw", "value": {"selected": "left"}},
                        {"from_name": "comment", "value": {"text": ["good"]}},
                    ]
                }
            ],
        },
        ONE,
        TWO,
    ),
    "half a pair": ({"prompt": "q", "chosen": "a", "rejected": "b", "preferred": "A"}, "a", "b"),
    "models by number": (two("n", column="winner", model_1="m", model_2="n"), TWO, ONE),
}


@pytest.mark.parametrize("what", ORDINARY)
def test_what_is_certain_is_not_asked(what):
    row, chosen, rejected = ORDINARY[what]
    (pair,) = load_pairs([row])
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == [chosen, rejected]


@pytest.mark.parametrize("column, chosen", [("choice", ONE), ("preferred_response", TWO)])
def test_of_two_verdicts_that_disagree_the_one_that_is_named_counts(column, chosen):
    row = two("A", column="choice", preferred_response="response_b")
    (pair,) = load_pairs([row], columns={"preference": column})
    assert pair["chosen"][0]["content"] == chosen


def test_a_prompt_may_say_in_one_text_what_the_dialogues_say_in_two_turns():
    system, sides = {"role": "system", "content": "Be kind."}, dict(zip(("chosen", "rejected"), WHOLE, strict=True))
    whole = {side: [system, *turns] for side, turns in sides.items()}
    assert load_pairs([{"prompt": f"Be kind.\n\n{Q}", **whole}])[0]["prompt"] == [system, WHOLE[0][0]]
    with pytest.raises(UserError, match="prompt is not in the two dialogues"):
        load_pairs([{"prompt": f"Be kind.\n\n{Q}", **sides}])

"""The split: the bundled pairs as ever, and no question or talk on both sides of any other set."""

import random

import pytest
import xxhash

from helpers.common import UserError
from helpers.data.load import load_pairs
from helpers.data.split import HELD_OUT_TOPICS, prompt_families, split_pairs


def turn(role, content):
    return {"role": role, "content": content}


def talk(*texts, system=None):
    """A prompt whose turns are the user's and the assistant's by turns."""
    turns = [turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
    return [turn("system", system), *turns] if system else turns


def pairs_of(prompts, **columns):
    """Pairs with these prompts; the columns are lists of one value a pair."""
    return load_pairs(
        [
            {"prompt": prompt, "chosen": "a", "rejected": "b"} | {name: columns[name][row] for name in columns}
            for row, prompt in enumerate(prompts)
        ]
    )


def sides(split):
    return {name: [int(origin.split()[1]) - 1 for origin in split[name]["origin"]] for name in ("train", "test")}


def test_bundled_pairs_are_split_as_ever():
    pairs = load_pairs()
    calls = ({}, {"by": "prompt", "seed": 3, "test_size": 0.3}, {"by": "topic"})
    rows = [
        [split[side]["origin"][:] for side in ("train", "test")] for split in (split_pairs(pairs, **c) for c in calls)
    ]
    assert [xxhash.xxh3_64_hexdigest(repr(sides).encode()) for sides in rows] == [
        "15863257c793229d",
        "a737bef616aff9c1",
        "ab13330dcf347469",
    ]


# Another's set may have our topics among its own, or topics of any type.


def test_topics_of_the_bundled_pairs_hold_out_nothing_of_another_set():
    topics = [*HELD_OUT_TOPICS, "history", "music"] * 8
    pairs = pairs_of([f"Question {n}?" for n in range(40)], topic=topics)
    split = split_pairs(pairs, test_size=0.2)
    assert len(split["test"]) == 8  # as asked for; our topics are 24 pairs
    assert len(set(split["test"]["topic"]) - set(HELD_OUT_TOPICS)) > 0
    by_hand = split_pairs(pairs, by="topic", held_out=HELD_OUT_TOPICS)
    assert set(by_hand["test"]["topic"]) == set(HELD_OUT_TOPICS)


def test_bundled_pairs_without_their_topics_are_split_by_prompt():
    assert len(split_pairs(load_pairs().remove_columns("topic"))["test"]) == 96


@pytest.mark.parametrize("topics", [[["a", "b"], ["c"]], [{"name": "a"}, {"name": "b", "of": [1]}], [None, 3]])
def test_a_topic_of_any_type(topics):
    pairs = pairs_of([f"Question {n}?" for n in range(10)], topic=topics * 5)
    assert len(split_pairs(pairs)["test"]) == 2
    rows = sides(split_pairs(pairs, by="topic", test_size=0.5))
    assert {row % 2 for row in rows["train"]} != {row % 2 for row in rows["test"]} and len(rows["test"]) == 5


def test_held_out_values_that_are_no_texts():
    pairs = pairs_of([f"Question {n}?" for n in range(10)], level=[1, 2] * 5)
    assert set(split_pairs(pairs, by="level", held_out=[2])["test"]["level"]) == {2}


# Families


def test_what_belongs_together():
    prompts = [
        talk("Why?"),
        talk("why? ", system="Be brief."),  # the same question
        talk("Why?", "Because.", "And how?"),  # a later turn of it
        talk("Why?", "Because.", "And how?", "So.", "Thanks."),
        talk("WHY?", "Well.", "Tell me.", system="Be kind."),  # another talk that begins with it
        talk("Why? Because. And how?"),  # one turn that reads like three
        talk("Why?assistant: Because.user: And how?"),
        talk("Why not?"),
        talk("Hi", "Hello.", "How are you?"),  # two talks of one opening, which is no prompt here
        talk("Hi", "Hello.", "Who are you?"),
        talk("Hi", "Hello.", "Who are you?", "A model.", "Which?"),
    ]
    expected = [{0, 1, 2, 3, 4}, {5}, {6}, {7}, {8}, {9, 10}]
    for order in (prompts, prompts[::-1]):
        families = {}
        for prompt, family in zip(order, prompt_families(order), strict=True):
            families.setdefault(family, set()).add(prompts.index(prompt))
        assert sorted(families.values(), key=min) == expected
    assert prompt_families([[turn("system", "Only this.")], []]) == ["", ""]


def random_talks(seed):
    """Talks of few texts, so that many of them begin alike; each row is one, up to one of its user turns."""
    rng = random.Random(seed)
    for _ in range(rng.randint(2, 60)):
        texts = rng.choices(["a", "b", "A ", "a b", "c"], k=rng.choice([1, 1, 3, 5, 7]))
        yield talk(*texts, system=rng.choice([None, None, "x", "y"]))


def related(one, other):
    """Whether one is the beginning of the other, written out."""
    turns = [
        [(t["role"], " ".join(t["content"].split()).lower()) for t in prompt if t["role"] != "system"]
        for prompt in (one, other)
    ]
    return all(a == b for a, b in zip(*turns, strict=False))


@pytest.mark.parametrize("seed", range(30))
def test_no_question_and_no_talk_is_on_both_sides(seed):
    prompts = list(random_talks(seed))
    rng = random.Random(seed)
    share = rng.choice([0.2, 0.4, 0.6])
    families = prompt_families(prompts)
    if min(map(families.count, families)) > round(share * len(prompts)):
        with pytest.raises(UserError, match="leaves one side empty"):
            split_pairs(pairs_of(prompts), test_size=share, seed=seed)
        return
    rows = sides(split_pairs(pairs_of(prompts), test_size=share, seed=seed))
    assert not any(related(prompts[a], prompts[b]) for a in rows["train"] for b in rows["test"])
    assert sorted(rows["train"] + rows["test"]) == list(range(len(prompts)))
    room = round(share * len(prompts)) - len(rows["test"])
    assert room >= 0  # never more than asked for, and no group that was left in training would still fit
    assert all(families.count(families[row]) > room for row in rows["train"])


@pytest.mark.parametrize("seed", range(10))
def test_families_are_no_larger_than_they_must_be(seed):
    prompts = list(random_talks(seed))
    group = list(range(len(prompts)))  # connected by hand
    for a in range(len(prompts)):
        for b in range(a):
            if related(prompts[a], prompts[b]):
                group = [group[b] if one == group[a] else one for one in group]
    families = prompt_families(prompts)
    same = [[a == b for b in families] for a in families]
    assert same == [[a == b for b in group] for a in group]


def test_a_talk_under_two_topics_is_named():
    prompts = [talk("Why?"), talk("Why?", "So.", "And?"), talk("How?"), talk("How?", system="Be brief.")]
    with pytest.raises(UserError, match=r"question or talk .* \(row 1, row 2\)"):
        split_pairs(pairs_of(prompts, topic=["x", "y", "y", "y"]), by="topic", held_out=["x"])
    with pytest.raises(UserError, match=r"\(row 3, row 4\)"):
        split_pairs(pairs_of(prompts, topic=["x", "x", "x", "y"]), by="topic", held_out=["y"])
    split = split_pairs(pairs_of(prompts, topic=["x", "x", "y", "y"]), by="topic", held_out=["y"])
    assert sides(split) == {"train": [0, 1], "test": [2, 3]}


# Shapes of public sets


def test_turns_of_hh_rlhf_stay_together():
    def dialogue(turns, answer):
        names = ("Human", "Assistant")
        parts = [f"\n\n{names[place % 2]}: {text}" for place, text in enumerate([*turns, answer])]
        return "".join(parts)

    rows, of = [], []
    for number in range(30):
        texts = [f"question {number}", f"reply {number}", "why?", "because", "and then?"]
        for size in (1, 3, 5):
            rows.append({side: dialogue(texts[:size], side) for side in ("chosen", "rejected")})
            of.append(number)
    for seed in range(5):
        rows_of = sides(split_pairs(load_pairs(rows), seed=seed))
        assert not {of[row] for row in rows_of["train"]} & {of[row] for row in rows_of["test"]}
        assert len(rows_of["test"]) == 18


def test_system_prompts_of_orca_do_not_part_a_question():
    systems = ["", "You are an AI assistant.", "Think step by step."]
    rows = [
        {"system": systems[n % 3], "question": f"Question {n // 3}?", "chosen": f"a{n}", "rejected": "b"}
        for n in range(60)
    ]
    for seed in range(5):
        rows_of = sides(split_pairs(load_pairs(rows), seed=seed))
        assert not {row // 3 for row in rows_of["train"]} & {row // 3 for row in rows_of["test"]}
        assert len(rows_of["test"]) == 12


def test_one_question_with_accents_written_in_two_ways_is_one_family():
    one, other, third = prompt_families([talk("Caf\u00e9?"), talk("CAFE\u0301?"), talk("Cafe?")])
    assert one == other != third

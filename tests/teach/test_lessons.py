"""What only a lesson needs."""

import json

from helpers.data.load import BUNDLED_PAIRS, load_pairs
from helpers.data.split import split_pairs
from helpers.teach.lessons import lesson_pairs


def test_a_lesson_takes_192_of_the_bundled_pairs(capsys):
    train = split_pairs(load_pairs(BUNDLED_PAIRS))["train"]
    assert lesson_pairs(train)["origin"] == train["origin"][:192]
    assert capsys.readouterr().out == "Training on 192 of 360 bundled pairs, so that it takes minutes.\n"


def test_a_lesson_takes_all_pairs_of_a_reader(tmp_path, capsys):
    rows = [{"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": "I see."} for n in range(300)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for own in (load_pairs(path), load_pairs(rows)):
        train = split_pairs(own)["train"]
        capsys.readouterr()
        assert lesson_pairs(train)["origin"] == train["origin"][:] and len(train) == 240
        assert capsys.readouterr().out == "Training on all 240 pairs.\n"

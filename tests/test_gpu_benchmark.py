"""The GPU benchmark without a GPU: what it would run, its arithmetic, and a side that fails."""

import json

import pytest

from benchmarks import gpu


def test_dry_run_says_what_would_run(capsys):
    gpu.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert list(told["sides"]) == list(gpu.SIDES) == [line.split()[0] for line in lines[:-1]]
    assert all(side["pairs"] * side["pieces"] == gpu.in_a_step(name) for name, side in told["sides"].items())
    # The memory that these settings took on an H100 before this benchmark was written.
    for name, gb in {"usual": 3.33, "two_rows_offloaded": 4.38, "two_rows_kept": 28.8}.items():
        assert told["sides"][name]["estimated_gb"] == pytest.approx(gb, rel=0.1)
    assert told["rule"]["80 GB"]["512"]["checkpointing"] is False
    assert told["rule"]["8 GB"]["1024"]["pairs"] < 8


def test_one_side_alone(capsys):
    gpu.main(["--dry-run", "--only", "usual"])
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["sides"]) == ["usual"]


def test_every_side_is_in_one_wave():
    assert sorted(sum(gpu.WAVES, [])) == sorted(gpu.SIDES)


def test_pairs_are_the_same_each_time_and_of_the_length_told():
    class Words:
        def __call__(self, text, **options):
            return {"input_ids": text.split()}

    short, long = gpu.make_pairs(Words(), 512), gpu.make_pairs(Words(), 1024)
    assert short == gpu.make_pairs(Words(), 512)
    words = [sum(len(turn[0]["content"].split()) for turn in pair.values()) for pair in short]
    prompts = [len(pair["prompt"][0]["content"].split()) for pair in short]
    mean = sum(w + p for w, p in zip(words, prompts, strict=True)) / len(short) / 2
    assert 320 < mean < 360  # the template's marks come on top
    longer = [len(pair["chosen"][0]["content"].split()) for pair in long]
    assert max(longer) < 2 * 240 + 1


def test_operations_of_a_pair():
    config = json.loads((gpu.HERE / "qwen3_4b" / "config.json").read_text())
    found = gpu.needed_flops(config, (170, 180, 180), shared=False)
    # 3.6 billion weights in the layers, 2 operations each for a token, forward and backward; the head for completions.
    assert found["layers"] == pytest.approx(4 * 3.63e9 * 700, rel=0.01)
    assert found["head"] == pytest.approx(4 * 0.389e9 * 360, rel=0.01)
    assert found["lora"] == pytest.approx(6 * 33.03e6 * 700, rel=0.01)  # what PEFT counts as trainable at rank 16
    # 36 layers of 32 heads of 128 numbers: two products forward, four backward, over the keys that each query sees.
    assert found["attention"] == 36 * 32 * 128 * 12 * 2 * sum(range(1, 351))


def test_a_prompt_computed_once_is_counted_once():
    config = json.loads((gpu.HERE / "qwen3_4b" / "config.json").read_text())
    shared, twice = (gpu.needed_flops(config, (200, 100, 50), shared=shared) for shared in (True, False))
    assert shared["layers"] / twice["layers"] == shared["lora"] / twice["lora"] == 350 / 550
    assert shared["head"] == twice["head"]
    once = sum(range(1, 201)) + sum(range(201, 301)) + sum(range(201, 251))  # prompt, chosen, rejected
    assert shared["attention"] / twice["attention"] == once / (once + sum(range(1, 201)))


SIDE = {
    "pairs_per_s": 2.0,
    "pairs_per_s_best_turn": 20.0,
    "peak_gb": 3.0,
    "losses": [0.6931, 0.69],
    "tflop_per_s": 20.0,
}


def test_sides_are_compared_with_the_usual_one():
    table = gpu.compare(
        {
            "usual": SIDE,
            "ours": SIDE
            | {"pairs_per_s": 10.0, "reference_pairs_per_s": 40.0, "peak_gb": 4.5, "losses": [0.6931, 0.7]},
            "ours_1024": SIDE,
            "kept": {"error": "out of memory"},
        },
        rate=100e12,
    )
    assert list(table) == ["usual", "ours", "ours_1024"]
    assert (table["ours"]["times_usual"], table["ours"]["memory_of_usual"]) == (5.0, 1.5)
    assert table["ours"]["times_usual_one_epoch"] == 4.0  # 8 pairs a second with the reference's pass
    assert table["ours"]["max_loss_difference"] == 0.01
    assert "times_usual" not in table["ours_1024"] and table["ours"]["share_of_matrix_rate"] == 0.2


def test_sides_are_compared_with_the_best_of_their_kind():
    cached = SIDE | {"reference_pairs_per_s": 20.0}
    sides = {
        "ours": cached | {"pairs_per_s": 20.0},
        "expert": cached | {"pairs_per_s": 10.0, "reference_pairs_per_s": 5.0},
        "expert_on_card": cached | {"pairs_per_s": 5.0, "peak_gb": 6.0},
        "expert_kept": SIDE | {"pairs_per_s": 100.0},
        "expert_offload": {"error": "refused"},
    }
    best = {"best": "expert_on_card", "times_best": 2.5, "best_by_step": "expert", "times_best_by_step": 2.0}
    best |= {"times_best_in_best_turn": 1.0, "memory_of_best": 0.5}
    assert gpu.compare_with_best(sides) == {"ours": best}
    assert gpu.compare_with_best({"ours": cached, "expert": {"error": "refused"}}) == {}


def test_the_fair_table_has_ten_sides_of_experts_and_others():
    fair = sum(gpu.WAVES[:2], [])
    assert {gpu.SIDES[name].get("expert") for name in fair} == {"short", "room", None} and len(fair) >= 10
    assert all(gpu.SIDES[name]["by"] != "train_dpo" for name in fair if "expert" in gpu.SIDES[name])
    assert all(
        gpu.SIDES[name]["cached"] and gpu.SIDES[name]["pairs"] == 8 for name in fair if "expert" in gpu.SIDES[name]
    )


@pytest.mark.slow
def test_a_side_that_fails_is_told_with_its_error(tmp_path):
    results = gpu.run_wave(["stock"], str(tmp_path / "none"), 120)
    assert list(results) == ["stock"] and "none" in results["stock"]["error"].splitlines()[-1]


def test_sides_that_fail_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """One cannot be loaded, one dies while it waits for its turn."""
    script = tmp_path / "side.py"
    script.write_text(
        """
import sys
name = sys.argv[sys.argv.index("--side") + 1]
if name == "stock":
    sys.exit("no such model")
print("ready", flush=True)
if name == "expert_kept":
    sys.exit("killed")
for _ in range(4):
    sys.stdin.readline()
    print("ready", flush=True)
sys.stdin.readline()
print('result {"pairs_per_s": 2.0}', flush=True)
"""
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "quiet", lambda: 0.0)  # it waits for a machine without other work
    results = gpu.run_wave(["stock", "expert_kept", "ours"], str(tmp_path), 30)
    assert "no such model" in results["stock"]["error"] and "killed" in results["expert_kept"]["error"]
    assert results["ours"] == {"pairs_per_s": 2.0}
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("before turn")]
    assert len(told) == 3


def test_the_fastest_turn():
    assert gpu.best_turn([8.0, 2.0, 2.0, 9.0, 1.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 9.0]) == round(8 / 3, 2)

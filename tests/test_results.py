"""The README's tables are those of the committed results, and the results say what is claimed of them."""

import pytest

from tools import tables


def test_readme_has_the_tables_of_the_committed_results():
    text = tables.README.read_text(encoding="utf-8")
    assert tables.current(text) == text, "python tools/tables.py"


def test_check_fails_on_a_number_that_is_not_in_the_results(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    text = tables.README.read_text(encoding="utf-8").replace("| 23.70 |", "| 24.70 |")
    readme.write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "README", readme)
    with pytest.raises(SystemExit, match=r"tools/tables\.py"):
        tables.main(["--check"])
    assert readme.read_text(encoding="utf-8") == text
    tables.main([])
    tables.main(["--check"])


def test_train_dpo_is_five_times_as_fast_as_the_usual_notebook_on_a_gpu_in_little_more_memory():
    gpu = tables.result("gpu")
    ours = gpu["against_usual"]["ours"]
    runs = [(ours["times_usual"], ours["memory_of_usual"])]
    runs += [(host["ours_times_usual"], host["ours_memory_of_usual"]) for host in gpu["same_card_other_hosts"]]
    assert all(times >= 5 and memory <= 1.5 for times, memory in runs)

"""Writing that fails half-way leaves what was there."""

import json
from pathlib import Path

import pytest

from helpers.common import write_atomic, write_json


def test_a_reader_sees_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})
    with pytest.raises(TypeError):
        write_json(path, {"status": object()})

    def stops(part: str) -> None:
        Path(part).write_text('{"status": ')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, stops)
    assert json.loads(path.read_text()) == {"status": "running"}
    assert list(tmp_path.iterdir()) == [path]  # no part is left

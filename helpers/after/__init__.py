"""After training: what is wrong with a run, what it changed, which beta to take, handing it over."""

from pathlib import Path
from typing import Any

import yaml

from helpers.common import UserError

_REFUSED: dict[str, str] = yaml.safe_load(Path(__file__).with_name("refused.yaml").read_text("utf-8"))


def refused(code: str, /, **values: Any) -> UserError:
    """The error that refused.yaml has under this code, with its `values`."""
    return UserError(_REFUSED[code].format(**values))

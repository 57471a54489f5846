"""After training: what a run changed, which beta to take, handing it over."""

from pathlib import Path

from helpers.common import errors_of

refused = errors_of(Path(__file__).with_name("refused.yaml"))

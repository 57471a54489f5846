"""What only a notebook shows: figures from plain numbers, and tables of what the lab measured."""

from helpers.teach.lessons import *  # noqa: F403
from helpers.teach.plots import *  # noqa: F403

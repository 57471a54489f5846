"""The one exception that speaks to the reader: what is wrong, where, and what to do."""


class UserError(ValueError):
    """A mistake that we could foresee in a setting, a file or a model; its text names the cure."""

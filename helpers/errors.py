"""The one exception that speaks to the reader: what is wrong, where, and what to do.

Every room raises it for what a user can mend; what a user cannot is left to the library's own exception.
"""


class UserError(ValueError):
    """A mistake that we could foresee in a setting, a file or a model; its text names the cure."""

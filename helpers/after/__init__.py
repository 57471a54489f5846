"""After training: what a run changed, which beta to take, handing it over."""

from helpers.common import errors_of

refused = errors_of(__file__, "refused.yaml")

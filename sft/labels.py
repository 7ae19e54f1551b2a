"""The label value that the loss ignores."""

IGNORE_INDEX = -100
"""Label of a position that is not trained: the default `ignore_index` of torch's cross entropy."""

"""What says which tokens are trained: the label value that the loss ignores, and the columns that mask labels."""

IGNORE_INDEX = -100
"""Label of a position that is not trained: the default `ignore_index` of torch's cross entropy."""

MASKS = ("completion_mask", "assistant_masks")
"""Columns of a tokenized row with a 1 for each token that may be trained; a 0 makes its label `IGNORE_INDEX`."""

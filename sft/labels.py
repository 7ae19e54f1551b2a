"""How rows mark the tokens that are trained: the label that the loss ignores, and the names of token masks."""

IGNORE_INDEX = -100
"""Label of a position that is not trained: the default `ignore_index` of torch's cross entropy."""

TOKEN_MASKS = ("completion_mask", "assistant_masks")
"""Columns of zeros and ones per token; a token is trained only where each mask that the row has is 1."""

TEACHER_ROWS = "teacher_rows"
"""Column of token rows with the number of each token's recorded distribution, -1 = none (`sft.loss.teacher`)."""

LOSS_GROUPS = "loss_groups"
"""Column of token rows with the number of the group that each token's loss is reported in, -1 = none; see
`SFTTrainer.loss_groups`."""

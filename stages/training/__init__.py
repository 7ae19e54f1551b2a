"""One training: options, checkpoints, curve, out of memory.

Imports `stages.models`, `stages.tracking` and the rooms below them.
"""

"""Training rows as a stream (`load.streaming`): read, checked, rendered, tokenized and packed while `train` trains.

Imports `stages.loading`, `stages.shards` and the rooms below them.
"""

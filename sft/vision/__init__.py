"""Rows with images: rendering, loading, collating. Imports `sft.batches`, `sft.chat`, `sft.data` and `sft.tokens`."""

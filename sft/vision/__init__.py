"""Rows with images: render, decode, collate. Imports `sft.batches`, `sft.chat`, `sft.data` and `sft.tokens`."""

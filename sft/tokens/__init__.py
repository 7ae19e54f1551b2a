"""Tokenization of rendered text to rows with labels: length limit, packing, preview. Imports `sft.chat`, `sft.data`."""

"""Attention that keeps the documents of a packed row separate: kernels, choice, probe. Imports `sft.batches`."""

"""Attention that keeps the documents of a packed row apart: kernels, choice, proof. Imports `sft.batches`."""

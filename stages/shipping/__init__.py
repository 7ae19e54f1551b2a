"""The shipped folder: a model with its card, its bill of materials, a data card, its record, digests and signature."""

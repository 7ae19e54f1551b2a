"""Rows collated into one batch of tensors, with the borders of its documents. Imports no other room."""

"""Rows collated into one batch of tensors, with the boundaries of its documents. Imports no other room."""

"""Serving engines in environments of their own (`make engines`), and whether their answers are the evaluated ones."""

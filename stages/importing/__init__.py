"""Configurations of other projects as params.yaml: what becomes of each of their keys."""

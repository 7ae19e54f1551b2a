"""The models of a run: the base (resolved or embedded) and its variants.

Imports `stages.checkout` and `stages.params`.
"""

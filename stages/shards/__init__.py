"""Long files worked on in pieces by several processes or Ray: rendering and encoding.

Imports `stages.checkout` and `stages.params`.
"""

"""Records rendered to text, with the character spans that are trained: templates, formats, sandbox.

Imports `sft.data`.
"""

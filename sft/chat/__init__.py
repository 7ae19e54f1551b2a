"""Rendering of records to text with the character spans that are trained: chat templates, named formats, sandbox.

Imports `sft.data`.
"""

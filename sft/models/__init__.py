"""Models, tokenizers and adapters: load them, check that they are complete, train rows of new tokens.

Imports `sft.attention` and `sft.chat`.
"""

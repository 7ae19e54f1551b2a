"""Models, tokenizers and adapters: loading, checks that they are complete, training of new tokens' embeddings.

Imports `sft.attention` and `sft.chat`.
"""

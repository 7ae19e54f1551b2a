"""Models as they are shipped: merged, GPTQ, int8 and nf4, GGUF, each compared with the model it stands for.

Imports `sft.chat` and `sft.models`.
"""

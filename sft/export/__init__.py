"""Export of trained models: merged, GPTQ, int8 and nf4, GGUF; each result is compared with the model it was made from.

Imports `sft.chat` and `sft.models`.
"""

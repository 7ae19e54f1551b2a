"""Faster versions of layers: matrix products, LoRA, norms, SwiGLU, Liger. Imports no other room."""

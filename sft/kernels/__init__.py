"""Layers in fewer passes over memory: matrix products, LoRA, norms, SwiGLU, Liger. Imports no other room."""

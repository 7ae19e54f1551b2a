"""Measurements on one GPU: numerics against the CPU, speed at the shapes of real models, and the pipeline."""

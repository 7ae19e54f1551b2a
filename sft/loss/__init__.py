"""Language model head and cross entropy on supervised tokens only. Imports `sft.batches` and `sft.kernels`."""

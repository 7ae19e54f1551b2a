"""What params.yaml may say: sections, names and ranges of figures, names of tasks. Imports `stages.checkout`."""

"""What params.yaml may contain: sections, names and ranges of figures, names of tasks. Imports `stages.checkout`."""

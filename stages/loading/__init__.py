"""The work of `load`: sources, checks, selection, counts. Imports `stages.checkout` and `stages.params`."""

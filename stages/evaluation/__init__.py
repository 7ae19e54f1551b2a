"""The work of `evaluate`: rows, results, soundness, lm-eval. Imports `stages.models` and the rooms below it."""

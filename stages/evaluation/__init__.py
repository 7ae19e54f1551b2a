"""Parts of the stage `evaluate`: rows, results, checks of the models, lm-eval.

Imports `stages.models` and the rooms below it.
"""

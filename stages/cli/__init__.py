"""The command `sft`, which is also `python -m stages`: its commands with their options, and how it runs DVC."""

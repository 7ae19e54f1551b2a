"""Recipes: small overlays of params.yaml for named models and tasks, and what a training of them needs."""

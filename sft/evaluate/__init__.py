"""Evaluation: likelihood, generated answers, tasks, intervals, the gate, lm-eval. Imports no other room."""

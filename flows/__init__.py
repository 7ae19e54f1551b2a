"""Prefect flows that run the stages of dvc.yaml through DVC.

A flow decides when a stage is run, DVC decides whether it must run, and the stage computes in a separate process. Flows
never import torch or transformers, so that they start fast and survive a crash of a stage.
"""

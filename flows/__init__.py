"""The orchestration: Prefect flows that run the stages of dvc.yaml through DVC.

Nothing here computes: a flow decides when a stage is run, DVC whether it must, and the stage does the work in a process
of its own. So that a flow starts fast and a crash of the work can't take it along, torch and transformers are never
imported here.
"""

"""Sweeps: search, plan, leaderboard. Imports `flows.runs`."""

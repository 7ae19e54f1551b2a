"""Cleanup of caches and leftovers. Imports `flows.processes` and `flows.runs`."""

"""Measured reliability: kills, resumes, damaged input, memory, full disks, two users; figures in docs/reliability.md.

Each part runs alone: `python -m benchmarks.reliability.PART --help`. It adds its figures to `results.json` and writes
the page.
"""

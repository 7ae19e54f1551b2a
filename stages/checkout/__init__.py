"""Where files lie and how they are written: paths, artifacts, ledger, secrets, full disks, git worktrees. Imports no other room."""

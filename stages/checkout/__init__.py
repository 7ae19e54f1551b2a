"""Files of a checkout: paths, artifacts, ledger, secrets, full disks, git worktrees. Imports no other room."""

"""Files of a checkout: paths, artifacts, ledger, secrets, full disks, worktrees, code. Imports no other room."""

"""Where files lie and how they are written: paths, artifacts, ledger, secrets, full disks. Imports no other room."""

"""Paths of files and how they are written: artifacts, ledger, secrets, full disks. Imports no other room."""

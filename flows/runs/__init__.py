"""One run: plan, form, stage, worktree, recorded inputs, report. Imports `flows.processes`."""

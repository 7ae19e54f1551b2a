"""MLflow: store, lineage, live run, result, champion, trials. Imports `stages.checkout` and `stages.params`."""

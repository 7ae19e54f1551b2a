"""HTML pages and the model card, with their templates. Imports `stages.tracking` and the rooms below it."""

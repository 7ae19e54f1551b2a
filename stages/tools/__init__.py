"""`python -m stages` chat, check, compare, estimate, preview, reproduce, serve and summary. Imports the other rooms."""

"""Work on long files in shards, by several processes or Ray: rendering and encoding.

Imports `stages.checkout` and `stages.params`.
"""

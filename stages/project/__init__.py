"""A project of one's own, which uses the installed package: `sft init`, and the digests of the package's code."""

"""`SFTTrainer`, and the decisions it makes before it trains. Imports every room but `sft.export` and `sft.evaluate`."""

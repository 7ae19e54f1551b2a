"""`SFTTrainer`, and what it decides and checks before it trains.

Imports all rooms of `sft` but `sft.export` and `sft.evaluate`.
"""

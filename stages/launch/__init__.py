"""The processes of a stage: accelerate, engines, Ray, one training per device.

Imports `stages.training` and the rooms below it.
"""

"""Optimizers: their names and packages, groups of parameters with their own rate, Muon."""

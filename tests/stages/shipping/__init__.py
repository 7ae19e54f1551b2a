"""Tests of the shipped folder."""

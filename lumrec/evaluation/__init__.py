"""Evaluation of LUMs, rankers and two-tower models."""

"""Evaluation of LUMs, rankers and retrieval."""

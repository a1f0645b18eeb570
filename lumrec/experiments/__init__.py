"""Experiments, which run several stages: pipeline, tuning, the paper's tables, and reports."""

"""Ranking metrics, bootstrap intervals, and the comparison of two runs."""

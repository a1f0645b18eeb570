"""Metrics and protocols of evaluation."""

"""What runs several stages: pipeline, tuning, the paper's tables, reports."""

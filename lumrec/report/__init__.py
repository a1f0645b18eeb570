"""Tables and plots drawn from metrics.jsonl and result.json."""

"""Step 2: group query over a user base, and the knowledge store."""

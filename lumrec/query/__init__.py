"""Step 2: conditions, group query, and the build of a knowledge store (LUM section 4.2)."""

"""Makes windows, packs and rows from prepared data, and loads them in batches."""

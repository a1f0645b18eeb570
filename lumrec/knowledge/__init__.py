"""The knowledge store: records, writer, reader, refresh, forget, Parquet exchange."""

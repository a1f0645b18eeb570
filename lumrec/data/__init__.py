"""From an interaction log to jagged packs and ranker rows."""

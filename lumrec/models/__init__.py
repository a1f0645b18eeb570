"""Models from their settings and the prepared data; trained ones from their run folder."""

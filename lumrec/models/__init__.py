"""Builds models from their settings and the prepared data, and loads trained ones from their run folders."""

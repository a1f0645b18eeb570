"""Reads interaction logs and makes prepared data from them."""

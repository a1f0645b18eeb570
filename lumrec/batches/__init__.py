"""Prepared data → windows, packs and rows, and the loaders that deal them out."""

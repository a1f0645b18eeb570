"""Serving: a trained ranker as a bundle, the state of users, the scorer and the server."""

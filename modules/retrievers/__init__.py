"""Retrievers: a vector for each user and each item; the items nearest to a user are the candidates of the rankers."""

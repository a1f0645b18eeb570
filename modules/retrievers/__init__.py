"""Retrievers: vectors of users and items; the items nearest to a user become the candidates of the rankers."""

"""Rankers of step 3, each after its paper, with and without LUM knowledge."""

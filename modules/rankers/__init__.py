"""The rankers of step 3, each as in its paper, with or without a LUM's knowledge."""

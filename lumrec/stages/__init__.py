"""One module for each app, with the same name."""

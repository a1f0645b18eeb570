"""Your own log: its files, columns, times, and the check before it is prepared."""

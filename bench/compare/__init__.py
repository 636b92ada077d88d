"""Two revisions call by call, and two runs ratio by ratio."""

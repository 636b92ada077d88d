"""How a call is judged, timed and counted, and the file that keeps it."""

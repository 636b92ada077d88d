"""The nouns of a call; torch only, nothing of the package but each other."""

"""Students and their weights to files and back."""

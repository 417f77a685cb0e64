"""Reading and rewriting a float network."""

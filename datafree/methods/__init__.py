"""One method a file; found by scanning this folder."""

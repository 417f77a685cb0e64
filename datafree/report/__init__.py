"""What is told of a run: evidence that no data was read, the manifest, the page with its plots, runs side by side."""

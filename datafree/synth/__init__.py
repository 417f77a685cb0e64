"""Where inputs come from when there are no data."""

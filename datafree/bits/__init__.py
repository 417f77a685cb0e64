"""How many bits each layer gets, and what they cost."""

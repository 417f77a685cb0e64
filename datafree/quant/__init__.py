"""Numbers to integers and back, and the networks that carry them."""

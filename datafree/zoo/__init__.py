"""Networks that come with the package, weights included: import them from their own file, ``datafree.zoo.digits``."""

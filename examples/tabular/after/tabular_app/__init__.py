"""A Flower app: a generator of patient records."""

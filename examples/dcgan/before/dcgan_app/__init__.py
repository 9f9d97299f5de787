"""A Flower app: a DCGAN of digits."""

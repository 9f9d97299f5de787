"""A Flower app: a GAN of digits."""

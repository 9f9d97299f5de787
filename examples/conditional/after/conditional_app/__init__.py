"""A Flower app: a class-conditional GAN of digits."""

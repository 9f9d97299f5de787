"""A Flower app of NumPyClients: a GAN of digits."""

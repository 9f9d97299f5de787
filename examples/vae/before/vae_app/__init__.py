"""A Flower app: a variational autoencoder of digits."""

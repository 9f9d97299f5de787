"""How a network learns: the one WGAN loop, the one distillation, checkpoints, random numbers.

Imports `generators`, `persistence` and `transport`.
"""

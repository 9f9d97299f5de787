"""What travels between server and nodes: keys, arrays and their validation, screening.

Imports `generators`; the only room that `strategies` and `clients` share about messages.
"""

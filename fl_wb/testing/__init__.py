"""Support for tests and benchmarks of Flower apps: a Grid that runs nodes in this process.

Imports `private_apis`.
"""

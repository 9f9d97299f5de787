"""What a run shows and leaves: progress, tables, pictures, TensorBoard events, result files.

Imports `metrics` (which figures are better high) and `persistence`.
"""

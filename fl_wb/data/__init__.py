"""Real data: readers of what people have, and which node gets what of it.

Imports nothing of FL-WB.
"""

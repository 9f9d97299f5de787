"""What a generator is: networks, how they are sampled and copied, several of them as one map.

Imports nothing of FL-WB: this is the lowest room.
"""

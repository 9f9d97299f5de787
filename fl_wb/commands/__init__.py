"""What is typed: `fl-wb`, `fl-wb-report`, and how they launch Flower.

The highest room; nothing imports it.
"""

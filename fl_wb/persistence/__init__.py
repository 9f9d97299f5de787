"""State on disk: tensors written atomically and checked when read, stores named by what went in.

Imports nothing of FL-WB.
"""

"""What a server keeps of its nodes, and the model that it makes of it, round by round.

Imports `barycenter`, `messages`, `reporting` and what lies below them.
"""

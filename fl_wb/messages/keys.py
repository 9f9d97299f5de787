"""The keys of what messages carry; `strategies/` and `clients/` share these."""

from __future__ import annotations

# Keys of the records in a message (the first three are Flower's own defaults).
ARRAYS = "arrays"
CRITIC = "critic"  # ArrayRecord beside the generator's, where a run asks for it
CONFIG = "config"
METRICS = "metrics"
INFO = "info"  # ConfigRecord of a reply: PARTITION and, from a target, TERNARY
CODE = "fl-wb.code"  # ConfigRecord beside a model: SHARES of its latents' cells, FORGOTTEN ones
SAMPLES = "samples"  # ArrayRecord of an evaluate reply: a few pictures, by name

# Keys inside these records.
WEIGHT = "num-examples"
PARTITION = "partition"
TERNARY = "ternary"
SHARES = "shares"
LABELS = "label-counts"  # how often a node has each label: a list in the metrics of a train reply
FORGOTTEN = "forgotten"  # cells that nobody is to sample any more, by their places
FORGET = "forget"  # beside ROLE: whether what a node sent is to be forgotten
AGAIN = "again"  # beside ROLE: whether it is for this round alone, and to be asked for again
ROLE = "role"
SOURCE, TARGET, BOTH, NONE = "source", "target", "both", "none"
ROLES = (SOURCE, TARGET, BOTH, NONE)

"""The plan of an epoch: which sample in which step on which rank. Pure functions.

May import `shards.dataset` and what lies below it.
"""

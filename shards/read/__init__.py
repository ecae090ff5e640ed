"""Samples of a data set: decoded in threads, in the order of a plan.

May import `shards.plan`, `shards.masks` and what lies below.
"""

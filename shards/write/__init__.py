"""The writer of data sets: the same input gives the same bytes, whole or absent.

May import `shards.source` and what lies below it.
"""

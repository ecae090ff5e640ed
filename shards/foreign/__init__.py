"""Tars that were written elsewhere, indexed where they lie.

May import `shards.read`, `shards.source` and what lies below.
"""

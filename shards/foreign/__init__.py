"""Tars that were written elsewhere, indexed where they lie.

May import `shards.source`, `shards.read`, `shards.dataset` and what lies below.
"""

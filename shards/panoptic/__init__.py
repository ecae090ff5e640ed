"""Panoptic segmentation: PNGs of segment ids, their contents, and the built-in data set in that form.

May import `shards.synthetic`, `shards.dataset` and what lies below.
"""

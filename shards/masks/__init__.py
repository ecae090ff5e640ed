"""Segmentations: COCO's polygons and run lengths parsed, and converted to masks and back.

May import `shards.dataset` and what lies below it; with `shards.score` the only home of pycocotools.
"""

"""A COCO document and its images: read into columns, checked, every defect named.

May import `shards.masks`, `shards.plan` and what lies below.
"""

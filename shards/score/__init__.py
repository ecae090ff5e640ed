"""Scores of detections against the truth: COCO's twelve numbers and the curves behind them.

May import `shards.dataset`, `shards.masks` and what lies below.
"""

"""Scores of detections against the truth: COCO's twelve numbers and the curves behind them.

May import `shards.read`, `shards.source` and what lies below; with `shards.masks` the only home of pycocotools,
and the only one of hotcoco.
"""

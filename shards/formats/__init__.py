"""Other formats of annotations (Pascal VOC, YOLO), read as a COCO document in memory and written like one.

May import `shards.write` and what lies below it.
"""

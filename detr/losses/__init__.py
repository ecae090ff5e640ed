"""Losses of matched pairs, for every variant of the model: boxes, masks, and reports of wrong classes.

May import `detr.matcher` and what lies below it.
"""

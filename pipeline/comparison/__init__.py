"""Comparison of models on the same images, and the promotion of a version that it allows.

May import `pipeline.inference`, which evaluates a version whose detections were not kept, and what lies below it.
"""

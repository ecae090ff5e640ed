"""Models from and to other formats: checkpoints of the original, ONNX.

May import `pipeline.registry` and what lies below it; never Ray.
"""

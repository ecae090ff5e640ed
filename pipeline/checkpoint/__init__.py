"""Checkpoints of a run: complete or absent, in a folder or a store by URL, read without unpickling code.

May import `pipeline.distributed` and what lies below it; never Ray or MLflow.
"""

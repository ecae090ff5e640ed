"""Evaluation of a model on a data set: each image once, on all ranks.

May import `pipeline.data`, `pipeline.distributed`, `shards` and `detr`; never Ray or MLflow.
"""

"""Evaluation of a model on a data set: each image once, on all ranks.

May import `pipeline.data`, `pipeline.checkpoint`, `pipeline.tracking` and what lies below; never Ray or MLflow.
"""

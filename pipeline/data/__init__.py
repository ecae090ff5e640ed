"""The data sets of a run and the loader that makes batches of them.

May import `pipeline.distributed`, `pipeline.config`, `shards` and `detr`; never Ray or MLflow.
"""

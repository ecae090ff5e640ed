"""Checkpoints of a run: whole or absent, in a folder or a store by URL, read without unpickling code.

May import `pipeline.distributed`, `pipeline.config` and `shards.store`; never Ray or MLflow.
"""

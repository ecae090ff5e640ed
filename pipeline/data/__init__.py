"""The data sets of a run and the loader that makes batches of them.

May import `pipeline.distributed` and what lies below it; never Ray or MLflow.
"""

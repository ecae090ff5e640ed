"""Reports of a run, sent to MLflow without ever stopping the training.

May import `pipeline.distributed`, `pipeline.schedule`, `pipeline.run_folder` and what lies below; MLflow, but never Ray.
"""

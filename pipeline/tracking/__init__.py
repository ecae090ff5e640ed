"""What a run reports and how it reaches MLflow without stopping the training.

May import `pipeline.distributed`, `pipeline.schedule`, `pipeline.run_folder` and `pipeline.config`; MLflow, but
never Ray.
"""

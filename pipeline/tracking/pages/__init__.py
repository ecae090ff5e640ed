"""Pages of MLflow as a person meets them: links, parameters, descriptions and views.

May import the other modules of `pipeline.tracking`, which import nothing of it but `mlflow_runs` and `ui`.
"""

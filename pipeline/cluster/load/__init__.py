"""Load of the machines that train: MLflow shows it as system metrics."""

"""A client of a test's own MLflow store."""

import pytest
from mlflow import MlflowClient

from pipeline.tracking.mlflow_client import connect


@pytest.fixture
def client(store: str) -> MlflowClient:
    return connect()

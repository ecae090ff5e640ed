"""MLflow model of a registered version: `mlflow models serve` and `mlflow.pyfunc.load_model` run this file.

MLflow stores the file as code ("models from code") and executes it when the model is loaded, so nothing is pickled.
Input: a column `image` of base64 strings, each an encoded picture. Output: one JSON string per picture, a list of
detections with category id, name, score, box and, if the model predicts it, mask. A string column works with every form of
request.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from pipeline.inference.detector import Detector, coco_results

ARTIFACT = "detector"


class DetrModel(PythonModel):  # type: ignore[misc]  # mlflow is not typed
    """Detector as an MLflow model; weights and card come from its artifact folder."""

    def load_context(self, context: Any) -> None:
        """Build the detector once, when the server starts."""
        self._detector = Detector(Path(context.artifacts[ARTIFACT]))

    # Untyped, because MLflow would take type hints for a schema, and the signature is more precise.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return one JSON list per row of `model_input["image"]`; the parameter `threshold` is 0.5 by default."""
        threshold = float((params or {}).get("threshold", 0.5))
        images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in model_input["image"]]
        found = self._detector(images, threshold)
        return [json.dumps(coco_results(number, detections)) for number, detections in enumerate(found)]


# Importing this file has an effect: MLflow requires a model's code to set the model. Nothing else imports it.
mlflow.models.set_model(DetrModel())

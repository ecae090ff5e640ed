"""The registered model's MLflow face: `mlflow models serve` and `mlflow.pyfunc.load_model` run this file.

MLflow stores the file as code ("models from code") and executes it when the model is loaded, so nothing is pickled.
Input: a column `image` of base64 strings, each an encoded picture. Output: one JSON string per picture, a list of
detections with category id, name, score, box and, of a model with them, mask. A string column serves every form of request.
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

from pipeline.predict import Detector, coco_results

ARTIFACT = "detector"


class DetrModel(PythonModel):  # type: ignore[misc]  # mlflow is not typed
    """Weights and card come from the artifact folder; `threshold` may be passed as a parameter."""

    def load_context(self, context: Any) -> None:
        """Build the detector once, when the server starts."""
        self._detector = Detector(Path(context.artifacts[ARTIFACT]))

    # Untyped, because MLflow takes type hints here for a schema, and the signature says it better.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """One JSON list per row of `model_input["image"]`."""
        threshold = float((params or {}).get("threshold", 0.5))
        images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in model_input["image"]]
        found = self._detector(images, threshold)
        return [json.dumps(coco_results(number, one)) for number, one in enumerate(found)]


# The one import with an effect: MLflow asks a model's code to name the model, and nothing else imports this file.
mlflow.models.set_model(DetrModel())

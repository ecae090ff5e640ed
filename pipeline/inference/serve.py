"""MLflow model of a registered version: `mlflow models serve` and `mlflow.pyfunc.load_model` run this file.

MLflow stores the file as code ("models from code") and executes it when the model is loaded, so nothing is pickled.
Input: a column `image` of base64 strings, each an encoded picture; a string column works with every form of request.
Output: for each picture its size in pixels and its detections with category id, name, score, box and, if the model predicts
it, mask. A panoptic model also gives segments, as run lengths and as COCO's PNG in base64. `docs/serving.md` is the user's description.
"""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from pipeline.inference.detector import Detector, coco_result
from pipeline.inference.requests import RequestError, read_options, read_picture, refuse_unknown_parameters
from shards.errors import PictureError

ARTIFACT = "detector"


class DetrModel(PythonModel):  # type: ignore[misc]  # mlflow is not typed
    """Detector as an MLflow model; weights and card come from its artifact folder."""

    def load_context(self, context: Any) -> None:
        """Build the detector once, when the server starts."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._detector = Detector(Path(context.artifacts[ARTIFACT]), device)
        refuse_unknown_parameters()

    # Untyped, because MLflow would take type hints for a schema, and the signature is more precise.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return the answer to each row of `model_input["image"]`; raise `RequestError`, never anything else."""
        try:
            return self._answers(list(model_input["image"]), params or {})
        except RequestError:
            raise
        except Exception as error:  # MLflow would send the traceback to the client
            logging.getLogger(__name__).exception("a request failed")
            raise RequestError("the detector failed; the server's log has the reason", internal=True) from error

    def _answers(self, rows: list[object], parameters: dict[str, Any]) -> list[dict[str, Any]]:
        options = read_options(parameters)
        answers: list[dict[str, Any]] = []
        wrong: list[str] = []
        for number, row in enumerate(rows):
            try:
                picture = read_picture(row, options.exif)
            except PictureError as error:
                wrong.append(f"row {number}: {error}")
                answers.append({"error": str(error)})
                continue
            if not wrong or options.bad_rows == "report":  # otherwise the request is refused, after all its rows
                answers.append(self._answer(picture, options.threshold))
        if wrong and options.bad_rows == "refuse":
            right = f" ({len(rows) - len(wrong)} of {len(rows)} rows are right)" if len(wrong) < len(rows) else ""
            raise RequestError("; ".join(wrong) + right)
        return answers

    def _answer(self, picture: Image.Image, threshold: float) -> dict[str, Any]:
        found, segments = self._detector.read(picture, threshold)
        answer: dict[str, Any] = {
            "width": picture.width,
            "height": picture.height,
            "detections": [coco_result(detection) for detection in found],
        }
        if segments is not None:
            answer["segments"] = segments.with_run_lengths(self._detector.card.categories)
            answer["panoptic_png"] = base64.b64encode(segments.png()).decode()
        return answer


# Importing this file has an effect: MLflow requires a model's code to set the model. Nothing else imports it.
mlflow.models.set_model(DetrModel())

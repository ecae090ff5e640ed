"""Requests to a served version: options and pictures, checked, and refusals of one line.

Needs only what a served version lists as its requirements.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlflow.pyfunc
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from PIL import Image

from shards.errors import PictureError
from shards.rgb import Exif, decode_picture, open_picture

_ALL = {"exif": ("upright", "ignore"), "bad_rows": ("refuse", "report")}


@dataclass(frozen=True)
class Options:
    """Parameters of a request; the fields are their names and defaults."""

    threshold: float = 0.5
    """Lowest score of a detection, 0 to 1."""
    exif: Exif = "upright"
    """`upright` turns a picture as its camera was held; `ignore` takes the pixels as stored, as COCO's boxes do."""
    bad_rows: Literal["refuse", "report"] = "refuse"
    """`refuse` answers a request with a wrong row with an error alone; `report` answers the other rows beside it."""


class RequestError(MlflowException):  # type: ignore[misc]  # mlflow is not typed
    """Raised for a request that cannot be answered. MLflow's server sends the message, status 400 or 500, and no traceback."""

    def __init__(self, message: str, *, internal: bool = False) -> None:
        super().__init__(message, error_code=INTERNAL_ERROR if internal else INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """The message as it was raised."""
        return str(self.__dict__["text"])

    @message.setter
    def message(self, text: str) -> None:  # the server would put all of the request's data in front of it
        self.__dict__.setdefault("text", text)


def read_options(parameters: Mapping[str, Any]) -> Options:
    """Return the checked parameters of a request; raise `RequestError`."""
    if unknown := sorted(set(parameters) - set(Options.__dataclass_fields__)):
        raise RequestError(
            f"unknown parameter {', '.join(unknown)}; known are {', '.join(Options.__dataclass_fields__)}"
        )
    options = Options(**parameters)
    if not 0 <= options.threshold <= 1:
        raise RequestError(f"threshold is {options.threshold:g}; expected a score from 0 to 1")
    for name, known in _ALL.items():
        if (got := getattr(options, name)) not in known:
            raise RequestError(f"{name} is {got!r}; expected {' or '.join(known)}")
    return options


def read_picture(value: object, exif: Exif) -> Image.Image:
    """Return the picture in a row, base64 or a data: URL of it, as RGB; raise `PictureError`."""
    if not isinstance(value, str):  # null among strings may arrive as NaN
        raise PictureError("null or no string; expected a picture as base64")
    head, comma, rest = value.partition(",") if value.startswith("data:") else ("", "", value)
    if head and not (comma and head.endswith(";base64")):
        raise PictureError("a data: URL without base64; expected data:image/jpeg;base64, and the picture")
    try:
        content = base64.b64decode(rest, validate=True)
    except ValueError:
        raise PictureError(
            "not base64; expected a picture file in the standard alphabet, without line breaks"
        ) from None
    if not content:
        raise PictureError("empty; expected a picture as base64")
    with open_picture(io.BytesIO(content)) as image:
        return decode_picture(image, exif)


def refuse_unknown_parameters() -> None:
    """Make MLflow refuse unknown parameters of a request; it drops them, with a line in the server's log alone.

    Other models in this process are not affected.
    """
    original = mlflow.pyfunc._enforce_params_schema

    def checked(params: Any, schema: Any) -> Any:
        names = {spec.name for spec in schema.params} if schema else set()
        if isinstance(params, Mapping) and names == set(Options.__dataclass_fields__):
            read_options({str(name): value for name, value in params.items() if name not in names})
        return original(params, schema)

    if getattr(original, "__module__", "") != __name__:  # not yet
        mlflow.pyfunc._enforce_params_schema = checked

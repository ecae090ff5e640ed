"""Requests to a served version: options, pictures, and the message of a refusal."""

import json

import mlflow.pyfunc
import pytest
from mlflow.types import DataType, ParamSchema, ParamSpec

from pipeline.inference.requests import Options, RequestError, read_options, read_picture, refuse_unknown_parameters
from pipeline.registry.mlflow_model import signature
from shards.errors import PictureError
from tests.support.pictures import HEIGHT, WIDTH, base64_of, kinds

GOOD = str(next(kind for kind in kinds() if kind.name == "JPEG").rows[0])


def test_a_refusal_keeps_its_message_where_mlflows_server_puts_the_data_before_it() -> None:
    error = RequestError("row 1: wrong")
    error.message = f"Failed to predict data '{GOOD}'. \nError: {error.message}"
    assert (error.message, str(error), error.error_code) == ("row 1: wrong",) * 2 + ("INVALID_PARAMETER_VALUE",)
    assert json.loads(error.serialize_as_json())["message"] == "row 1: wrong"
    assert error.get_http_status_code() == 400
    assert RequestError("failed", internal=True).get_http_status_code() == 500


def test_a_request_without_parameters_has_the_defaults() -> None:
    assert read_options({}) == Options(0.5, "upright", "refuse")
    assert read_options({"threshold": 0, "exif": "ignore"}) == Options(0, "ignore", "refuse")


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_threshold_is_a_score(threshold: float) -> None:
    with pytest.raises(RequestError, match="expected a score from 0 to 1"):
        read_options({"threshold": threshold})


@pytest.mark.parametrize("start", ["data:image/jpeg;base64,", "data:;base64,", "data:image/jpeg;charset=x;base64,", ""])
def test_a_picture_is_base64_or_a_data_url_of_it(start: str) -> None:
    assert read_picture(start + GOOD, "upright").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("row", ["data:image/jpeg," + GOOD, "data:image/jpeg;base64" + GOOD, "data:,"])
def test_a_data_url_without_base64_is_refused(row: str) -> None:
    with pytest.raises(PictureError, match="a data: URL without base64"):
        read_picture(row, "upright")


@pytest.mark.parametrize("row", [GOOD + "!", GOOD[:-1], " " + GOOD, GOOD + "\n", GOOD.replace("/", "_"), "é", "===="])
def test_base64_is_strict(row: str) -> None:
    with pytest.raises(PictureError, match="not base64"):
        read_picture(row, "upright")


@pytest.mark.parametrize("row", [None, float("nan"), 7, b"bytes", [GOOD]])
def test_a_row_without_a_string_is_refused(row: object) -> None:
    with pytest.raises(PictureError, match="null or no string"):
        read_picture(row, "upright")


@pytest.mark.parametrize("row", ["", "data:image/jpeg;base64,"])
def test_a_row_without_a_byte_is_refused(row: str) -> None:
    with pytest.raises(PictureError, match="empty"):
        read_picture(row, "upright")


def test_bytes_of_no_picture_are_refused() -> None:
    with pytest.raises(PictureError, match="not a picture that can be read"):
        read_picture(base64_of(b"no picture"), "upright")


def test_mlflow_refuses_unknown_parameters_of_this_model_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mlflow.models.utils._enforce_params_schema  # an earlier test may have loaded a version
    monkeypatch.setattr(mlflow.pyfunc, "_enforce_params_schema", original)
    refuse_unknown_parameters()
    once = mlflow.pyfunc._enforce_params_schema
    refuse_unknown_parameters()
    assert mlflow.pyfunc._enforce_params_schema is once is not original
    ours, other = signature().params, ParamSchema([ParamSpec("threshold", DataType.double, 0.5)])
    assert once(None, ours) == {"threshold": 0.5, "exif": "upright", "bad_rows": "refuse"}
    assert once({"treshold": 0.1}, other) == {"threshold": 0.5}
    with pytest.raises(RequestError, match="unknown parameter treshold; known are threshold, exif, bad_rows"):
        once({"treshold": 0.1}, ours)

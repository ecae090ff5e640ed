"""The MLflow model: rows that are right and wrong, and errors that are not the request's."""

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipeline.inference.detector import Prediction
from pipeline.inference.requests import RequestError
from tests.support.pictures import HEIGHT, WIDTH, kinds

GOOD, WRONG = (next(kind for kind in kinds() if kind.name == name).rows[0] for name in ("JPEG", "text"))


@pytest.fixture
def model() -> Any:
    """A model whose detector finds an object in each picture."""
    with warnings.catch_warnings(record=True):  # MLflow advises type hints when the class is made
        from pipeline.inference.serve import DetrModel
    made = DetrModel()
    made._detector = SimpleNamespace(
        read=lambda picture, threshold: (
            [Prediction(7, "cat", 0, threshold, (1.0, 2.0, picture.width, picture.height))],
            None,
        )
    )
    return made


def test_an_answer_has_the_size_and_the_detections_of_its_picture(model: Any) -> None:
    found = {"category_id": 7, "category": "cat", "bbox": [1.0, 2.0, WIDTH - 1.0, HEIGHT - 2.0], "score": 0.25}
    answer = {"width": WIDTH, "height": HEIGHT, "detections": [found]}
    assert model.predict(None, {"image": [GOOD, GOOD]}, {"threshold": 0.25}) == [answer, answer]


def test_a_wrong_row_refuses_the_request_or_is_reported_in_its_answer(model: Any) -> None:
    with pytest.raises(RequestError, match=r"^row 1: not a picture .*\(2 of 3 rows are right\)$"):
        model.predict(None, {"image": [GOOD, WRONG, GOOD]})
    answers = model.predict(None, {"image": [GOOD, WRONG, GOOD]}, {"bad_rows": "report"})
    assert [sorted(answer) for answer in answers] == [["detections", "height", "width"], ["error"], sorted(answers[0])]


def test_no_picture_is_detected_in_after_a_wrong_row_of_a_request_that_is_refused(model: Any) -> None:
    seen: list[Image.Image] = []
    model._detector.read = lambda picture, threshold: (seen.append(picture) or [], None)
    with pytest.raises(RequestError):
        model.predict(None, {"image": [WRONG, GOOD, GOOD]})
    assert seen == []


def test_an_error_of_the_detector_is_a_line_for_the_client_and_a_traceback_in_the_log(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/opt/model: out of memory")

    model._detector.read = fail
    with caplog.at_level(logging.ERROR), pytest.raises(RequestError) as caught:
        model.predict(None, {"image": [GOOD]})
    assert (caught.value.message, caught.value.get_http_status_code()) == (
        "the detector failed; the server's log has the reason",
        500,
    )
    assert "out of memory" in caplog.text

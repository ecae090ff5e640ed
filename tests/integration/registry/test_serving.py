"""A registered version behind MLflow's server: every kind of request is answered, or refused in one line."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.driver.preflight import prepare
from pipeline.errors import ExchangeError, PipelineError
from pipeline.exchange.export_original import export_original
from pipeline.inference.evaluate import evaluate
from pipeline.inference.predict import predict
from pipeline.registry.registration import register_run
from pipeline.registry.versions import resolve
from tests.support.pictures import HEIGHT, WIDTH, Kind, encoded, kinds, png_of
from tests.support.registry import Trained, train_in
from tests.support.serving import ModelServer, serving

ROOT = Path(__file__).parents[3]
KINDS = {kind.name: kind for kind in kinds()}
GOOD = KINDS["JPEG"].rows[0]


@pytest.fixture(scope="module")
def trained(shared_store: str, short_config: RunConfig) -> Trained:
    """A run with a registered version, `tiny`, with nearly untrained weights."""
    trained = train_in(Path(shared_store.removeprefix("sqlite:///")).parent, short_config)
    register_run(trained.run_id, name="tiny", alias="best")
    return trained


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """A server of the version, on loopback, in this environment."""
    with serving("models:/tiny@best", tmp_path_factory.mktemp("server")) as server:
        yield server


def assert_refused(status: int, answer: Any, pattern: str) -> None:
    """The answer is one line, and has neither a traceback nor a path of the server."""
    assert status == 400, answer
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert re.search(pattern, answer["message"]), answer["message"]
    assert "\n" not in answer["message"]
    assert "stack_trace" not in answer
    assert not [path for path in (str(ROOT), "site-packages", "/tmp", ".py") if path in json.dumps(answer)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_row_is_answered_or_refused_in_one_line(server: ModelServer, kind: Kind) -> None:
    status, answer = server.ask(kind.rows, threshold=0.0)
    if kind.refusal:
        assert_refused(status, answer, kind.refusal)
        return
    assert status == 200, answer
    assert [(found["width"], found["height"]) for found in answer["predictions"]] == list(kind.sizes)
    for found in answer["predictions"]:
        assert set(found) == {"width", "height", "detections"}
        assert len(found["detections"]) == 8
        for detection in found["detections"]:
            assert set(detection) == {"category_id", "category", "bbox", "score"}
            x, y, width, height = detection["bbox"]
            assert -1e-3 <= x <= x + width <= found["width"] + 1e-3
            assert -1e-3 <= y <= y + height <= found["height"] + 1e-3


@pytest.mark.parametrize(
    ("parameters", "pattern"),
    [
        ({"threshold": 1.5}, r"^threshold is 1.5; expected a score from 0 to 1$"),
        ({"threshold": -0.1}, r"^threshold is -0.1;"),
        ({"threshold": float("nan")}, r"^threshold is nan;"),
        ({"treshold": 0.5}, r"^unknown parameter treshold; known are threshold, exif, bad_rows$"),
        ({"exif": "rotate"}, r"^exif is 'rotate'; expected upright or ignore$"),
        ({"bad_rows": ""}, r"^bad_rows is ''; expected refuse or report$"),
    ],
)
def test_a_wrong_parameter_is_refused(server: ModelServer, parameters: dict[str, object], pattern: str) -> None:
    assert_refused(*server.ask((GOOD,), **parameters), pattern)


def test_a_whole_number_is_a_threshold(server: ModelServer) -> None:
    status, answer = server.ask((GOOD,), threshold=1)
    assert (status, answer["predictions"][0]["detections"]) == (200, [])


def test_the_pixels_are_taken_as_stored_if_exif_is_ignored(server: ModelServer) -> None:
    _, answer = server.ask(KINDS["EXIF"].rows, exif="ignore")
    assert (answer["predictions"][0]["width"], answer["predictions"][0]["height"]) == (WIDTH, HEIGHT)


def test_rows_beside_a_wrong_one_are_answered_if_asked(server: ModelServer) -> None:
    rows = (GOOD, *KINDS["text"].rows, GOOD)
    status, answer = server.ask(rows, bad_rows="report", threshold=0.0)
    first, wrong, last = answer["predictions"]
    assert status == 200
    assert first == last == server.ask((GOOD,), threshold=0.0)[1]["predictions"][0]
    assert wrong == {"error": "not a picture that can be read; expected JPEG, PNG, WebP, BMP, GIF or TIFF"}


def test_all_wrong_rows_are_named_at_once(server: ModelServer) -> None:
    status, answer = server.ask(("*", GOOD, None, GOOD))
    assert_refused(status, answer, r"^row 0: not base64.*; row 2: null or no string.*\(2 of 4 rows are right\)$")


@pytest.mark.parametrize(
    "form", [{"instances": [{"image": GOOD}]}, {"inputs": {"image": [GOOD]}}, {"dataframe_records": [{"image": GOOD}]}]
)
def test_every_form_of_mlflows_requests_is_taken(server: ModelServer, form: dict[str, Any]) -> None:
    status, text = server.post(json.dumps(form).encode())
    assert status == 200, text
    assert json.loads(text)["predictions"][0]["width"] == WIDTH


def test_the_example_that_a_version_carries_is_answered(server: ModelServer, trained: Trained) -> None:
    (example,) = trained.artifacts.rglob("serving_input_example.json")
    status, text = server.post(example.read_bytes())
    assert status == 200, text
    assert (json.loads(text)["predictions"][0]["width"], json.loads(text)["predictions"][0]["height"]) == (96, 64)


@pytest.mark.parametrize(
    "body",
    [
        b"no JSON",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"dataframe_split": {"columns": ["picture"], "data": [["x"]]}}',
        b'{"dataframe_split": {"columns": ["image"], "data": [[7]]}}',
    ],
)
def test_mlflow_refuses_what_is_no_request_without_a_traceback(server: ModelServer, body: bytes) -> None:
    status, text = server.post(body)
    assert status == 400
    assert "Traceback" not in text
    assert str(ROOT) not in text


def test_the_command_in_the_documentation_works(server: ModelServer, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    (command,) = re.findall(r"```bash\n(\(printf.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert "127.0.0.1:5000/invocations" in command
    (tmp_path / "image.jpg").write_bytes(encoded(_picture()))
    script = command.replace(":5000/", f":{server.port}/")
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    assert json.loads(done.stdout)["predictions"][0]["width"] == WIDTH


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (WIDTH, HEIGHT), "red")


def test_the_server_is_alive_after_all_of_them(server: ModelServer) -> None:
    assert server.ask((GOOD,))[0] == 200
    assert "Traceback" not in server.log.read_text()
    assert len(png_of(20_000, 20_000)) < 100  # the 400 megapixels are in the header only


def test_using_a_version_leaves_the_temporary_folder_as_it_was(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    uri, data, picture = "models:/tiny@best", trained.config.data.val, tmp_path / "image.jpg"
    picture.write_bytes(encoded(_picture()))
    for _ in range(2):
        evaluate(uri, data)
        prepare(replace(trained.config, initial=uri), lambda line: None)
        with pytest.raises(ExchangeError, match="cannot express"):  # it reads the model first
            export_original(uri, tmp_path / "weights.pth")
        predict(uri, [picture], tmp_path / "found")
        with pytest.raises(PipelineError, match="Is a directory"):
            predict(uri, [picture.parent], tmp_path / "found")
    assert list(folder.rglob("*")) == []


def test_only_weights_and_card_of_a_version_are_fetched_and_its_code_is_one_file(
    trained: Trained, tmp_path: Path
) -> None:
    folder = resolve("models:/tiny@best", tmp_path)
    fetched = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert fetched == [folder / "card.json", folder / "model.safetensors"]
    (stored,) = (path.parent for path in trained.artifacts.rglob("MLmodel"))
    files = {str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file()}
    assert "code/detr.zip" in files
    assert len(files - {"registered_model_meta"}) == 10  # MLflow's server adds this beside them
    assert not re.search(f"{ROOT}|{tempfile.gettempdir()}", (stored / "MLmodel").read_text())  # of this machine
    readable = {path.stat().st_mode & 0o777 for path in stored.rglob("*") if path.is_file()}
    assert len(readable) == 1  # safetensors writes files that only their owner may read


LOAD = """
import base64, pathlib, sys
import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/tiny@best")
rows = pandas.DataFrame({"image": [base64.b64encode(pathlib.Path(sys.argv[1]).read_bytes()).decode()]})
found = model.predict(rows, params={"threshold": 0.0})
example = model.predict(model.input_example, params={"threshold": 0.0})
print(sys.modules["pipeline"].__file__, found[0]["width"], len(found[0]["detections"]), len(example[0]["detections"]))
"""


@pytest.mark.slow
def test_a_new_environment_with_the_packages_that_a_version_lists_loads_it_and_predicts(
    trained: Trained, tmp_path: Path
) -> None:
    (requirements,) = trained.artifacts.rglob("requirements.txt")
    uv, python = [sys.executable, "-m", "uv"], tmp_path / "venv" / "bin" / "python"
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    # The lock names what the listed packages need in turn; without it the newest ones would be downloaded here.
    install = [*uv, "pip", "install", "--quiet", "--python", str(python), "--requirements", str(requirements)]
    subprocess.run([*install, "--constraints", str(ROOT / "requirements.lock")], check=True)
    (tmp_path / "image.jpg").write_bytes(encoded(_picture()))
    command = [str(python), "-W", "ignore", "-c", LOAD, "image.jpg"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"code/detr\.zip/pipeline/__init__\.py 96 8 8$", done.stdout.strip()), done.stdout

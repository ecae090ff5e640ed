"""Answers of nodes to the probe, and the lines about them; the nodes are objects of this process."""

import base64
import hashlib
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.checkpoint.location import location
from pipeline.cluster.capacity import Node
from pipeline.cluster.node_check import NodeCheck, Question, code_digest, tracking_problem, versions
from pipeline.cluster.probe import answers, probe, problems_of, raise_problems
from pipeline.errors import Postponed, RunConfigError
from pipeline.recipes import RECIPES
from shards.store import storage
from shards.store.retry import StoreError
from tests.support.http_server import answering
from tests.support.ray_nodes import free_port

NODE = Node("10.0.0.2", {"CPU": 8})


@pytest.fixture
def question(tmp_path: Path) -> Question:
    """A question about a storage folder with the driver's file, and about one data file."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "token").write_text("token")
    (tmp_path / "manifest.json").write_text("{}")
    return Question(
        code_digest(), (f"{tmp_path}/runs",), "token", (f"{tmp_path}/manifest.json",), "sqlite:////mlflow.db", 0
    )


def lines(question: Question, data: dict[str, str] | None = None, **changed: Any) -> list[str]:
    """The problems of a node whose report is that of this process with other values."""
    report = NodeCheck("10.0.0.2").report(question) | {"host": "node-b"} | changed
    (digest,) = [hashlib.sha256(Path(url).read_bytes()).hexdigest() for url in question.data]
    found = problems_of([report], [NODE], [question], data or {question.data[0]: digest})
    return [f"{name}: {problem}" for name, problem in found]


def test_a_node_like_this_machine_has_no_problem(question: Question, tmp_path: Path) -> None:
    assert lines(question) == []
    assert (tmp_path / "runs" / "token-10.0.0.2").read_text() == "10.0.0.2"


def test_other_code_other_versions_and_no_package_are_named(question: Question) -> None:
    (other,) = lines(question, digest="0123456789abcdef")
    assert other.startswith(f"10.0.0.2 (node-b): has other code (0123456789abcdef instead of {code_digest()})")
    (older,) = lines(question, versions=versions() | {"torch": "2.11.0", "mlflow": ""})
    assert f"torch 2.11.0 instead of {versions()['torch']}, mlflow missing instead of" in older
    (bare,) = lines(question, digest="")
    assert "has no detr-cluster package" in bare


def test_a_storage_that_the_node_does_not_share_is_named(question: Question, tmp_path: Path) -> None:
    (line,) = lines(replace(question, storages=(f"{tmp_path}/elsewhere",)))
    assert f"storage {tmp_path}/elsewhere does not show what the driver wrote there" in line
    assert not (tmp_path / "elsewhere").exists()


def test_a_scratch_folder_that_cannot_be_made_is_named_and_a_usable_one_left_as_it_was(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    monkeypatch.setenv("DETR_SCRATCH", str(scratch))
    assert lines(question) == []
    assert list(scratch.iterdir()) == []
    scratch.rmdir()
    scratch.write_text("a file")
    (line,) = lines(question)
    assert line.startswith(f"10.0.0.2 (node-b): scratch folder {scratch} cannot be made (")


def test_a_check_that_raises_on_a_node_is_reported_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.exceptions import RayTaskError

    cause = ModuleNotFoundError("No module named 'psutil'")

    def get(reference: object, timeout: float) -> None:
        raise RayTaskError("report", "traceback", cause).as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(RunConfigError, match=r"^node 10\.0\.0\.2: .*\(ModuleNotFoundError: No module named 'psutil'\)"):
        answers([object()], [NODE])


@pytest.mark.parametrize("runtime_env", [{}, {"pip": {"packages": ["torch==2.12.0"]}}], ids=["installed", "pip"])
def test_nodes_that_install_the_libraries_of_the_job_have_an_hour_for_it(
    runtime_env: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    limits: list[float] = []
    options: list[Any] = []
    printed: list[str] = []

    class Actor:
        """A node's process that answers at once, as `NodeCheck` does here."""

        def __init__(self, address: str = "") -> None:
            self.report = SimpleNamespace(remote=lambda question: NodeCheck(address).report(question))

        def options(self, **found: Any) -> Any:
            options.append(found)
            return SimpleNamespace(remote=Actor)

    def get(reference: Any, timeout: float) -> Any:
        limits.append(timeout)
        return reference

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=runtime_env))
    monkeypatch.setattr(ray, "remote", lambda checked: Actor())
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(ray, "get", get)
    url = storage.join(str(tmp_path), "data")
    config = replace(RECIPES["demo"], data=replace(RECIPES["demo"].data, train=url, val=url))
    probe(config, location(str(tmp_path)) / "run", [Node("127.0.0.1", {"CPU": 8}, "0" * 56)], False, printed.append)
    (limit,), (chosen,) = limits, options
    assert (limit > 3600) == bool(runtime_env)
    assert (chosen["runtime_env"].get("config") == {"setup_timeout_seconds": 3600}) == bool(runtime_env)
    assert len(printed) == len(runtime_env)


def test_data_that_is_absent_or_another_is_named(question: Question, tmp_path: Path) -> None:
    (other,) = lines(question, data={question.data[0]: "of another"})
    assert "is another data set than here" in other
    known = {f"{tmp_path}/gone": "of a set that is there"}
    gone = replace(question, data=tuple(known))
    (absent,) = [problem for _, problem in problems_of([NodeCheck("10.0.0.2").report(gone)], [NODE], [gone], known)]
    assert f"{tmp_path}/gone cannot be read" in absent


def test_an_mlflow_server_that_does_not_answer_is_named_without_its_password(
    question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (line,) = lines(replace(question, tracking_uri=uri))
    assert "does not reach MLflow at" in line
    assert "secret" not in line
    assert tracking_problem("sqlite:////mlflow.db") == ""


def test_gpus_that_torch_does_not_find_are_named(question: Question) -> None:
    (line,) = lines(replace(question, gpus=8), gpus=2)
    assert "finds 2 of 8 GPUs" in line


def test_a_problem_of_many_nodes_is_one_line_and_all_problems_are_printed() -> None:
    printed: list[str] = []
    with pytest.raises(RunConfigError, match=r"^nodes a, b, c and 1 more: has no package$"):
        raise_problems([(name, "has no package") for name in "abcd"] + [("e", "has other code")], printed.append)
    assert printed == ["node e: has other code"]
    raise_problems([], printed.append)


def test_problems_of_which_all_may_pass_leave_the_run_to_a_later_try(
    question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {question.data[0]: "0123"}

    def away(url: str) -> bytes:
        raise StoreError(f"{url}: no good answer")

    def late(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(storage, "read", away)
    monkeypatch.setattr(urllib.request, "urlopen", late)
    report = NodeCheck("10.0.0.2").report(replace(question, tracking_uri="http://10.0.0.9:5000")) | {"host": "b"}
    found = problems_of([report], [NODE], [question], data)
    assert len(found) == 3
    with pytest.raises(Postponed, match="does not answer now"):
        raise_problems(found, lambda _: None)
    with pytest.raises(RunConfigError, match="does not answer now"):
        raise_problems([*found, ("b", "has other code")], lambda _: None)


def test_a_refused_connection_to_mlflow_is_a_mistake() -> None:
    problem = tracking_problem(f"http://127.0.0.1:{free_port()}")
    assert problem
    with pytest.raises(RunConfigError):
        raise_problems([("b", problem)], lambda _: None)


def test_nodes_meet_at_their_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    alone = NodeCheck("127.0.0.1")
    port = alone.listen(1)
    assert alone.all_reduce("127.0.0.1", port, 0, 1, 5) == ""
    assert NodeCheck("127.0.0.1").all_reduce("127.0.0.1", free_port(), 1, 2, 0.2) != ""


def test_the_checks_run_where_the_package_is_missing(tmp_path: Path) -> None:
    """As on a bare node: the code is sent along, and nothing but the standard library is imported with it."""
    from ray import cloudpickle

    from pipeline.cluster import node_check

    cloudpickle.register_pickle_by_value(node_check)
    try:
        sent = cloudpickle.dumps((NodeCheck("10.0.0.2"), Question("0123", (), "token", (), "", 0)))
    finally:
        cloudpickle.unregister_pickle_by_value(node_check)
    (tmp_path / "sent").write_bytes(sent)
    (tmp_path / "shards").mkdir()  # an empty folder is a package to Python, too
    code = (
        "import sys, pickle; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "check, question = pickle.load(open('sent', 'rb')); check.prepare(); print(repr(check.report(question)['digest']))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert answer.stdout.strip() == "''", answer.stderr


def test_a_node_whose_login_mlflow_refuses_is_named_with_the_variables(
    question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    with answering(401, f"Basic {base64.b64encode(b'ada:hunter2').decode()}") as server:
        asked = replace(question, tracking_uri=server.url)
        assert lines(asked) == []
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter3")
        (line,) = lines(asked)
    assert "the login of this node is refused (401); expected" in line
    assert "MLFLOW_TRACKING_USERNAME" in line
    assert "hunter" not in line

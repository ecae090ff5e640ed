"""A user's mistake gives one line on stderr and the right exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.cli import COMMANDS
from tests.support.in_process import ROOT, Detr


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        ("tarin", "did you mean train?"),
        ("evalute models:/a@b", "did you mean evaluate?"),
        ("train detr-r5", "did you mean detr-r50?"),
        ("train detr-r101-dc", "did you mean detr-r101-dc5?"),
        ("show dem", "did you mean demo?"),
        ("train detr-r50 --optim.lrr 1", "did you mean --optim.lr"),
        ("train detr-r50 --model.num_querys 1", "did you mean --model.num-queries"),
        ("show demo --sed 1", "did you mean --seed"),
        ("shard coc", "expected one of coco|coco-panoptic|voc|yolo|index|verify|info"),
        ("shard", "expected one of coco|coco-panoptic|voc|yolo|index|verify|info"),
        ("jobs lst", "expected one of list|status|logs|stop"),
        ("train", "got no recipe"),
        ("submit local", "nothing to run"),
        ("evaluate models:/a@b", "--data"),
        ("shard coco --images a", "--annotations"),
        ("shard voc --root a", "--out"),
        ("shard yolo --root a --out b --splt c", "did you mean --split"),
        ("train detr-r50 --optim.lr fast", "fast"),
        ("train detr-r50 --optim.epochs 1.5", "1.5"),
        ("train detr-r50 --model.backbone vgg", "vgg"),
        ("resume", "RUN"),
        ("predict models:/a@b --out x", "no image given"),
        ("import w.pth", "--name"),
        ("import --name a", "FILE"),
        ("export models:/a@b", "expected --original FILE.pth or --onnx FILE.onnx"),
        ("export models:/a@b --orignal x", "did you mean --original"),
    ],
)  # fmt: skip
def test_mistyped_command_line_gives_one_line_and_status_2(detr: Detr, argv: str, nearest: str) -> None:
    result = detr(*argv.split())
    assert result.status == 2
    assert result.line.startswith("detr: ")
    assert nearest.lower() in result.line.lower()


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        ("show detr-r50 --optim.batch-size 0", 1, "optim.batch_size is 0; expected at least 1"),
        ("shard yolo --root absent --out o --workers -1", 1, "got --workers -1, expected 0 or more"),
        ("shard index absent --workers -1", 1, "got --workers -1, expected 0 or more"),
        ("train detr-r50 --optim.lr -1", 1, "optim.lr is -1.0; expected a positive learning rate"),
        ("train detr-r50 --cluster.workers 100", 1, "cluster.workers is 100 but optim.batch_size"),
        # The parser reports what `detr` refuses, since its error is a ValueError.
        ("show detr-r50 --model.num-queries 0", 2, "num_queries: got 0, expected at least 1; "),
        (
            "show detr-r50 --model.backbone resnet18 --model.dilation",
            2,
            "dilation: got True, expected False for resnet18; use resnet50 or resnet101; ",
        ),
    ],
)
def test_impossible_value_gives_one_line(detr: Detr, argv: str, status: int, expected: str) -> None:
    result = detr(*argv.split())
    assert result.status == status
    assert expected in result.line


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_error_line_is_clean_on_any_terminal(tmp_path: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "show", "detr-r50", "--optim.lrr", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )
    assert done.stderr == (
        "detr: Unrecognized options: --optim.lrr, 1; did you mean --optim.lr?; "
        "`detr show detr-r50 --help` lists the options\n"
    )


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "text.json").write_text("no JSON")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("shard coco --images absent --annotations empty.json --out o", "absent"),
        ("shard coco --images images --annotations absent.json --out o", "absent.json"),
        ("shard coco --images images --annotations text.json --out o", "not valid JSON|not JSON|JSON"),
        ("shard coco --images images --annotations empty.json --out o", "images"),
        ("shard coco --images text.json --annotations empty.json --out o", "text.json"),
        ("shard voc --root absent --out o", "absent: no such folder"),
        ("shard voc --root images --out o", "images: has no XML files"),
        ("shard yolo --root absent --out o", "absent: no such folder"),
        ("shard yolo --root . --out o", "has images but no labels"),
        ("shard index absent", "absent: no such folder"),
        ("shard index images", "expected WebDataset tars (*.tar), found none"),
        ("shard info absent", "no manifest.json here"),
        ("shard verify absent", "no manifest.json here"),
        ("train detr-r50 --data.train absent --data.val absent", "no manifest.json here"),
        ("train overfit", "no manifest.json here"),
        ("evaluate models:/none@best --data absent", "there is no registered model 'none'"),
        ("predict models:/none@best absent.jpg --out o", "no such file"),
        ("predict models:/none@best text.json --out o", "not a picture"),
        ("import absent.pth --name a", "absent.pth: no such file"),
        ("import text.json --name a", "text.json: not a state dict"),
        ("export models:/none@best --original o/x.pth", "expected a file in a folder that exists"),
        ("export models:/none@best --original x.pth", "there is no registered model 'none'"),
        ("export models:/none@best --onnx x.onnx", "there is no registered model 'none'"),
        ("submit nowhere -- train demo", "there is no cluster 'nowhere'"),
        ("submit local -- tarin demo", "did you mean train?"),
        ("submit local -- train detr-r50 --data.train absent", "no manifest.json here"),
        ("train finetune", "finetune needs --initial models:/NAME@ALIAS or FILE"),
        ("submit local -- train finetune", "finetune needs --initial models:/NAME@ALIAS or FILE"),
    ],
)
def test_missing_or_foreign_file_gives_one_line_and_status_1(
    detr: Detr, coco: Path, store: str, argv: str, expected: str
) -> None:
    result = detr(*argv.split())
    assert result.status == 1
    assert any(word in result.line for word in expected.split("|"))
    assert not (coco / "o").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("evaluate models:/none@best --data {val}", "there is no registered model 'none'; expected one of: none yet"),
        ("evaluate runs/one --data {val}", "expected models:/NAME@ALIAS"),
        ("resume none", "there is no run 'none'"),
        ("resume models:/none@best", "there is no registered model 'none'"),
        ("runs none", "there is no run 'none'"),
        ("register none --name a", "there is no run 'none'"),
    ],
)
def test_unknown_run_or_model_gives_one_line_and_status_1(
    detr: Detr, store: str, tiny_data: object, argv: str, expected: str
) -> None:
    result = detr(*argv.format(val=tiny_data.val).split())  # type: ignore[attr-defined]
    assert result.status == 1
    assert expected in result.line


def test_unreachable_store_gives_one_line(detr: Detr, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = detr("runs")
    assert result.status == 1
    assert "http://127.0.0.1:9 does not answer" in result.line
    assert "hunter2" not in result.line


def test_unreachable_cluster_gives_one_line(detr: Detr, tmp_path: Path) -> None:
    result = detr("jobs", "list", "--address", "http://127.0.0.1:9")
    assert result.status == 1
    assert "no Ray job server answers at http://127.0.0.1:9" in result.line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied", "/proc/x"), "/proc/x: Permission denied; expected a path"),
        (OSError("memory://a: cannot be read\nmore"), "memory://a: cannot be read"),
    ],
)
def test_operating_system_error_gives_one_line(
    detr: Detr, monkeypatch: pytest.MonkeyPatch, error: OSError, expected: str
) -> None:
    def fails(argv: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "ui", cli.Command("", fails))
    result = detr("ui")
    assert result.status == 1
    assert expected in result.line


@pytest.mark.parametrize(("flag", "path"), [("--json", "absent/a.json"), ("--json", "."), ("--curves", "absent/a.png")])
def test_output_files_are_checked_before_evaluation(
    detr: Detr, monkeypatch: pytest.MonkeyPatch, flag: str, path: str
) -> None:
    from pipeline.inference import evaluate as evaluate_version

    monkeypatch.setattr(evaluate_version, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    result = detr("evaluate", "models:/a@b", "--data", "d", flag, path)
    assert result.status == 1
    assert f"{path} cannot be written; expected a file in a folder that exists" in result.line


@pytest.mark.parametrize("flag", ["--curves", "--report"])
def test_a_picture_or_report_with_per_layer_is_refused(detr: Detr, flag: str) -> None:
    result = detr("evaluate", "models:/a@b", "--data", "absent", "--per-layer", flag, "target")
    assert result.status == 2
    assert f"{flag} with --per-layer: expected only one of the two" in result.line


@pytest.mark.parametrize("value", ["0", "1.2", "nan"])
def test_nms_iou_outside_its_range_is_refused_before_reading(detr: Detr, value: str) -> None:
    result = detr("evaluate", "models:/a@b", "--data", "absent", "--per-layer", "--nms-iou", value)
    assert result.status == 2
    assert f"--nms-iou {value}: expected an IoU above 0, at most 1" in result.line


def test_nms_iou_without_per_layer_is_refused(detr: Detr) -> None:
    result = detr("evaluate", "models:/a@b", "--data", "absent", "--nms-iou", "0.5")
    assert result.status == 2
    assert "--nms-iou 0.5: expected --per-layer with it" in result.line

"""The command line: help is quick, and a mistake is one line on stderr with the right exit status."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from jobs import cli, run_commands
from jobs.cli import COMMANDS, run
from pipeline.config import from_json
from pipeline.recipes import NOTES, RECIPES

ROOT = Path(cli.__file__).parent.parent


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What was said on stderr, which must be exactly one line."""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err.strip()


Detr = Callable[..., Said]


@pytest.fixture
def detr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Detr:
    """The command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quiet", lambda: None)  # it would silence the warnings of the tests that follow

    def call(*argv: object) -> Said:
        try:
            status = run([str(word) for word in argv])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Said(status, *capsys.readouterr())

    return call


HELPS: list[list[str]] = [
    [],
    ["--help"],
    ["train", "--help"],
    ["train", "detr-r50", "--help"],
    ["show", "--help"],
    ["shard", "--help"],
    *([command, word, "--help"] for command, words in {
        "shard": ("coco", "voc", "yolo", "index", "verify", "info"), "jobs": ("list", "status", "logs", "stop")
    }.items() for word in words),
    ["jobs", "--help"],
    *([name, "--help"] for name in COMMANDS if name not in ("train", "show", "shard", "jobs")),
]  # fmt: skip

LOOK = f"""
import contextlib, io, json, sys
sys.path.insert(0, {str(ROOT)!r})
from jobs.cli import run
said = {{}}
for argv in json.loads(sys.argv[1]):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            status = run(argv)
    except SystemExit as error:
        status = error.code or 0
    heavy = sorted({{"torch", "torchvision", "ray", "mlflow", "pycocotools", "webdataset"}} & sys.modules.keys())
    said[" ".join(argv)] = [status, out.getvalue(), heavy]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str, list[str]]]:
    """Every help in one fresh process: exit status, text, and the heavy packages imported by then."""
    done = subprocess.run([sys.executable, "-c", LOOK, json.dumps(HELPS)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    said: dict[str, tuple[int, str, list[str]]] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("argv", HELPS, ids=" ".join)
def test_help_works_and_imports_nothing_heavy(argv: list[str], helps: dict[str, tuple[int, str, list[str]]]) -> None:
    status, text, heavy = helps[" ".join(argv)]
    assert status == 0
    assert "usage" in text.lower()
    assert heavy == []


def test_help_lists_every_command_and_every_recipe(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    assert all(f"  {name} " in helps["--help"][1] for name in COMMANDS)
    assert all(name in helps["train --help"][1] for name in RECIPES)
    fields = helps["train detr-r50 --help"][1]
    assert all(flag in fields for flag in ("--optim.lr", "--model.num-queries", "--seed", "--cluster.workers"))


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "tarin"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert done.stderr == "detr: there is no command 'tarin'; did you mean train? `detr --help` lists them\n"
    assert done.stdout == ""


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
        ("shard coc", "expected one of coco|voc|yolo|index|verify|info"),
        ("shard", "expected one of coco|voc|yolo|index|verify|info"),
        ("jobs lst", "expected one of list|status|logs|stop"),
        ("train", "which recipe?"),
        ("submit local", "nothing to run"),
        ("evaluate models:/a@b", "--data"),
        ("shard coco --images a", "--annotations"),
        ("shard voc --root a", "--out"),
        ("shard yolo --root a --out b --splt c", "did you mean --split"),
        ("train detr-r50 --optim.lr fast", "fast"),
        ("train detr-r50 --optim.epochs 1.5", "1.5"),
        ("train detr-r50 --model.backbone vgg", "vgg"),
        ("resume", "RUN"),
        ("predict models:/a@b --out x", "picture"),
        ("import w.pth", "--name"),
        ("import --name a", "PATH"),
        ("export models:/a@b", "expected --original FILE.pth or --onnx FILE.onnx"),
        ("export models:/a@b --orignal x", "did you mean --original"),
    ],
)  # fmt: skip
def test_a_mistyped_command_line_is_one_line_with_status_2(detr: Detr, argv: str, nearest: str) -> None:
    said = detr(*argv.split())
    assert said.status == 2
    assert said.line.startswith("detr: ")
    assert nearest.lower() in said.line.lower()


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
def test_an_impossible_value_is_one_line(detr: Detr, argv: str, status: int, expected: str) -> None:
    said = detr(*argv.split())
    assert said.status == status
    assert expected in said.line


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_line_is_clean_on_any_terminal(tmp_path: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "show", "detr-r50", "--optim.lrr", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
    )
    assert done.stderr == (
        "detr: Unrecognized options: --optim.lrr, 1; did you mean --optim.lr?; "
        "`detr show detr-r50 --help` lists what there is\n"
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
        ("evaluate models:/none@best --data absent", "no manifest.json here"),
        ("predict models:/none@best absent.jpg --out o", "no such file"),
        ("predict models:/none@best text.json --out o", "not a picture"),
        ("import absent.pth --name a", "absent.pth: no such file"),
        ("import text.json --name a", "text.json: not a state dict"),
        ("export models:/none@best --original o/x.pth", "expected a file in a folder that exists"),
        ("export models:/none@best --original x.pth", "there is no registered model 'none'"),
        ("export models:/none@best --onnx x.onnx", "there is no registered model 'none'"),
        ("submit nowhere -- train demo", "there is no spec 'nowhere'"),
        ("submit local -- tarin demo", "did you mean train?"),
        ("submit local -- train detr-r50 --data.train absent", "no manifest.json here"),
        ("train finetune", "finetune needs --initial models:/NAME@ALIAS or FILE"),
        ("submit local -- train finetune", "finetune needs --initial models:/NAME@ALIAS or FILE"),
    ],
)
def test_a_missing_or_foreign_file_is_one_line_with_status_1(
    detr: Detr, coco: Path, store: str, argv: str, expected: str
) -> None:
    said = detr(*argv.split())
    assert said.status == 1
    assert any(word in said.line for word in expected.split("|"))
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
def test_an_unknown_run_or_registered_name_is_one_line_with_status_1(
    detr: Detr, store: str, tiny_data: object, argv: str, expected: str
) -> None:
    said = detr(*argv.format(val=tiny_data.val).split())  # type: ignore[attr-defined]
    assert said.status == 1
    assert expected in said.line


def test_a_store_that_does_not_answer_is_one_line(detr: Detr, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = detr("runs")
    assert said.status == 1
    assert "http://***@127.0.0.1:9 does not answer" in said.line
    assert "hunter2" not in said.line


def test_a_cluster_that_does_not_answer_is_one_line(detr: Detr, tmp_path: Path) -> None:
    said = detr("jobs", "list", "--address", "http://127.0.0.1:9")
    assert said.status == 1
    assert "no Ray job server answers at http://127.0.0.1:9" in said.line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/proc/x"), "/proc/x: Permission denied; expected a path"),
        (OSError("memory://a: cannot be read\nmore"), "memory://a: cannot be read"),
    ],
)
def test_an_error_of_the_system_is_one_line(
    detr: Detr, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def fails(argv: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "ui", cli.Command("", fails))
    got = detr("ui")
    assert got.status == 1
    assert said in got.line


@pytest.mark.parametrize(("flag", "path"), [("--json", "absent/a.json"), ("--json", "."), ("--curves", "absent/a.png")])
def test_where_the_numbers_go_is_checked_before_they_are_computed(
    detr: Detr, monkeypatch: pytest.MonkeyPatch, flag: str, path: str
) -> None:
    from pipeline import registered

    monkeypatch.setattr(registered, "evaluate_registered", lambda *_, **__: pytest.fail("evaluated"))
    said = detr("evaluate", "models:/a@b", "--data", "d", flag, path)
    assert said.status == 2
    assert f"{flag} {path} cannot be written" in said.line


def test_the_curves_of_every_layer_are_not_drawn(detr: Detr) -> None:
    said = detr("evaluate", "models:/a@b", "--data", "absent", "--per-layer", "--curves", "curves.png")
    assert said.status == 2
    assert "--curves with --per-layer: expected one of the two" in said.line


@pytest.mark.parametrize("value", ["0", "1.2", "nan"])
def test_a_threshold_that_is_no_iou_is_refused_before_anything_is_read(detr: Detr, value: str) -> None:
    said = detr("evaluate", "models:/a@b", "--data", "absent", "--per-layer", "--nms-iou", value)
    assert said.status == 2
    assert f"--nms-iou {value}: expected an IoU above 0, at most 1" in said.line


def test_an_overlap_without_layers_to_suppress_in_is_not_ignored(detr: Detr) -> None:
    said = detr("evaluate", "models:/a@b", "--data", "absent", "--nms-iou", "0.5")
    assert said.status == 2
    assert "--nms-iou 0.5: expected --per-layer with it" in said.line


def test_an_interrupt_ends_with_status_130(detr: Detr, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "runs", cli.Command("", interrupted))
    said = detr("runs")
    assert (said.status, said.line) == (130, "detr: interrupted")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m jobs.cli show detr-r50 | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == ""


@pytest.mark.parametrize("name", RECIPES)
def test_show_prints_the_recipe_as_it_would_run(detr: Detr, name: str) -> None:
    said = detr("show", name)
    assert (said.status, said.err.removesuffix("\n")) == (0, NOTES.get(name, ""))
    assert from_json(said.out) == RECIPES[name]


def test_any_field_is_set_from_the_command_line(detr: Detr) -> None:
    words = [
        "--optim.lr",
        "2e-4",
        "--transform.train-scales",
        "400",
        "500",
        "--seed",
        "7",
        "--model.dilation",
        "--data.train",
        "here",
    ]
    config = from_json(detr("show", "detr-r50", *words).out)
    assert (config.optim.lr, config.transform.train_scales, config.seed) == (2e-4, (400, 500), 7)
    assert (config.model.dilation, config.data.train) == (True, "here")


@pytest.mark.parametrize("name", RECIPES)
def test_a_smoke_run_is_the_recipe_but_for_its_size(name: str) -> None:
    small = run_commands.smoke(RECIPES[name])
    elastic = replace(RECIPES[name], cluster=replace(RECIPES[name].cluster, workers=3, min_workers=2))
    assert run_commands.smoke(elastic) == small
    assert (small.optim.max_steps, small.optim.batch_size, small.cluster.workers) == (2, 2, 1)
    assert small.model.backbone_weights == "random"
    assert small.model_name.endswith("-smoke")
    assert small.cluster.gpu != "yes"
    assert (small.loss, small.optim.lr) == (RECIPES[name].loss, RECIPES[name].optim.lr)


def test_a_data_set_is_written_described_and_verified(detr: Detr, tiny_data: object, tmp_path: Path) -> None:
    source = tiny_data.root / "coco"  # type: ignore[attr-defined]
    made = detr(
        "shard", "coco", "--images", source / "val", "--annotations", source / "annotations" / "instances_val.json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert made.status == 0
    assert "images      5 in 1 shards" in made.out
    info = detr("shard", "info", tmp_path / "out")
    assert "categories  1 circle, 2 square, 3 triangle, 4 cross" in info.out
    assert detr("shard", "verify", tmp_path / "out").out.endswith("every byte as written\n")
    shard = tmp_path / "out" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    damaged = detr("shard", "verify", tmp_path / "out")
    assert damaged.status == 1
    assert "shard-000000.tar" in damaged.err
    assert ": 1 problem; expected" in damaged.err


def test_labels_of_other_formats_become_a_data_set(detr: Detr, tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "train" / "12.jpg")
    (tmp_path / "labels" / "train" / "12.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    said = detr("shard", "yolo", "--root", ".", "--split", "train", "--out", "yolo", "--workers", "0")
    assert (said.status, said.err) == (0, "")
    assert f"data set    {tmp_path.name}-train in {tmp_path}/yolo" in said.out
    xml = "<annotation><object><name>dog</name><difficult>1</difficult><bndbox><xmin>11</xmin><ymin>8</ymin>"
    xml += "<xmax>30</xmax><ymax>23</ymax></bndbox></object></annotation>"
    (tmp_path / "images" / "train" / "12.xml").write_text(xml)
    said = detr("shard", "voc", "--root", "images/train", "--out", "voc", "--limit", "1", "--zero-based")
    assert (said.status, said.err) == (0, "")
    assert "annotations 1 (1 crowd regions)" in said.out
    said = detr("shard", "info", "voc")
    assert "classes     20" in said.out
    assert "categories  1 aeroplane, 2 bicycle" in said.out


def test_bad_labels_are_told_and_left_out_when_asked(detr: Detr, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "12.jpg")
    (tmp_path / "labels" / "12.txt").write_text("1 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.5 0.5\n")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    argv = "shard", "yolo", "--root", ".", "--out", "o", "--workers", "0", "--categories", "names.txt"
    said = detr(*argv)
    assert said.status == 1
    assert said.err.splitlines()[-1].startswith(
        "detr: .: 1 defect: labels/12.txt line 2: got class 7, expected one of the 2"
    )
    assert not (tmp_path / "o").exists()
    said = detr(*argv, "--on-defect", "quarantine")
    assert said.status == 0
    assert "WARNING: left out 0 of 1 images and 1 of 2 annotations" in said.err


def test_tars_become_a_data_set_where_they_lie(detr: Detr, tiny_data: object, tmp_path: Path) -> None:
    shutil.copytree(tiny_data.val, tmp_path / "tars")  # type: ignore[attr-defined]
    before = detr("shard", "info", "tars")
    (tmp_path / "tars" / "manifest.json").unlink()
    said = detr("shard", "index", "tars", "--name", "val", "--workers", "0")
    assert (said.status, said.err) == (0, "")
    assert "data set    val in" in said.out
    counts = [line for line in before.out.splitlines() if line.startswith(("images", "annotations", "classes"))]
    assert set(counts) <= set(said.out.splitlines())
    assert detr("shard", "verify", "tars").status == 0
    assert "is a data set already" in detr("shard", "index", "tars").line

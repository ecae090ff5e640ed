"""The command line: help, recipes and their flags, and the commands for data sets."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from jobs import cli, training
from jobs.cli import COMMANDS
from pipeline.config import from_json
from pipeline.recipes import NOTES, RECIPES
from pipeline.signals import Signalled
from tests.support.in_process import ROOT, Detr
from tests.support.panoptic_data import make_panoptic
from tests.support.tiny_data import TinyData

HELPS: list[list[str]] = [
    [],
    ["--help"],
    ["train", "--help"],
    ["train", "detr-r50", "--help"],
    ["show", "--help"],
    ["shard", "--help"],
    *([command, name, "--help"] for command, names in {
        "shard": ("coco", "coco-panoptic", "voc", "yolo", "index", "verify", "info"), "jobs": ("list", "status", "logs", "stop"), "clusters": ("check", "probe")
    }.items() for name in names),
    ["jobs", "--help"],
    *([name, "--help"] for name in COMMANDS if name not in ("train", "show", "shard", "jobs")),
]  # fmt: skip

LOOK = f"""
import contextlib, io, json, sys
sys.path.insert(0, {str(ROOT)!r})
from jobs.cli import run
helps = {{}}
for argv in json.loads(sys.argv[1]):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            status = run(argv)
    except SystemExit as error:
        status = error.code or 0
    heavy = sorted({{"torch", "torchvision", "ray", "mlflow", "pycocotools", "webdataset"}} & sys.modules.keys())
    helps[" ".join(argv)] = [status, out.getvalue(), heavy]
print(json.dumps(helps))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str, list[str]]]:
    """Return exit status, text and imported slow packages of every help, run in one new process."""
    done = subprocess.run([sys.executable, "-c", LOOK, json.dumps(HELPS)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    result: dict[str, tuple[int, str, list[str]]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("argv", HELPS, ids=" ".join)
def test_help_prints_usage_and_imports_no_heavy_package(
    argv: list[str], helps: dict[str, tuple[int, str, list[str]]]
) -> None:
    status, text, heavy = helps[" ".join(argv)]
    assert status == 0
    assert "usage" in text.lower()
    assert heavy == []


def test_help_lists_every_command_and_every_recipe(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    assert all(f"  {name} " in helps["--help"][1] for name in COMMANDS)
    assert all(name in helps["train --help"][1] for name in RECIPES)
    fields = helps["train detr-r50 --help"][1]
    assert all(flag in fields for flag in ("--optim.lr", "--model.num-queries", "--seed", "--cluster.workers"))


def test_help_of_a_flag_that_is_on_by_default_names_both_forms(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    text = " ".join(helps["train detr-r50 --help"][1].replace("│", " ").split())
    assert "--loss.auxiliary, --loss.no-auxiliary Compute the losses of every decoder layer" in text
    assert "--model.dilation, --model.no-dilation Dilate the last stage" in text


def test_flags_of_commands_that_only_switch_on_have_one_form(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    assert all("--no-" not in text for name, (_, text, _) in helps.items() if not name.startswith("train detr-r50"))
    assert "--keep-difficult" in helps["shard voc --help"][1]


def test_every_flag_has_a_help_text(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    for _, text, _ in helps.values():
        for raw, following in itertools.pairwise(text.splitlines()):
            line, following = raw.strip("│ "), following.strip("│ ")
            # A long pair of names takes two lines: `--a,` and `--no-a`. A text may begin a line with another flag.
            if re.match(r"(│ )?--[a-z]", raw) and not line.endswith(","):
                _, _, description = line.partition("  ")
                described = description.strip() or following
                assert not described.startswith(("(", "--")), line


def test_flag_that_is_on_by_default_can_be_switched_off(detr: Detr) -> None:
    assert not from_json(detr("show", "detr-r50", "--loss.no-auxiliary").out).loss.auxiliary
    assert from_json(detr("show", "detr-r50", "--loss.auxiliary").out).loss.auxiliary


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "tarin"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert done.stderr == "detr: there is no command 'tarin'; did you mean train? `detr --help` lists them\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("command", "error", "status", "line"),
    [
        ("runs", KeyboardInterrupt(), 130, "detr: interrupted"),
        ("evaluate", Signalled(signal.SIGTERM), 143, "detr: interrupted"),
        ("train", Signalled(signal.SIGTERM), 75, "detr: stopped before the workers ran; give the same command again"),
        ("resume", Signalled(signal.SIGINT), 75, "detr: stopped before the workers ran; give the same command again"),
    ],
)
def test_a_stop_before_anything_has_begun_has_its_status(
    detr: Detr, monkeypatch: pytest.MonkeyPatch, command: str, error: KeyboardInterrupt, status: int, line: str
) -> None:
    def interrupted(argv: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, command, cli.Command("", interrupted))
    result = detr(command)
    assert (result.status, result.line) == (status, line)


def test_closed_output_pipe_is_not_an_error(tmp_path: Path) -> None:
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
def test_show_prints_the_resolved_recipe(detr: Detr, name: str) -> None:
    result = detr("show", name)
    assert (result.status, result.err.removesuffix("\n")) == (0, NOTES.get(name, ""))
    assert from_json(result.out) == RECIPES[name]


def test_any_field_can_be_set_by_a_flag(detr: Detr) -> None:
    flags = [
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
    config = from_json(detr("show", "detr-r50", *flags).out)
    assert (config.optim.lr, config.transform.train_scales, config.seed) == (2e-4, (400, 500), 7)
    assert (config.model.dilation, config.data.train) == (True, "here")


@pytest.mark.parametrize("name", RECIPES)
def test_smoke_run_differs_from_the_recipe_only_in_size(name: str) -> None:
    small = training.smoke(RECIPES[name])
    elastic = replace(RECIPES[name], cluster=replace(RECIPES[name].cluster, workers=3, min_workers=2))
    assert training.smoke(elastic) == small
    assert (small.optim.max_steps, small.optim.batch_size, small.cluster.workers) == (2, 2, 1)
    assert small.model.backbone_weights == "random"
    assert small.track.register == "never"
    assert small.cluster.gpu != "yes"
    assert (small.loss, small.optim.lr) == (RECIPES[name].loss, RECIPES[name].optim.lr)


def test_coco_data_set_is_written_described_and_verified(detr: Detr, tiny_data: object, tmp_path: Path) -> None:
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
    assert detr("shard", "verify", tmp_path / "out", "--stock").out.endswith("read through webdataset as indexed\n")
    shard = tmp_path / "out" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    damaged = detr("shard", "verify", tmp_path / "out")
    assert damaged.status == 1
    assert detr("shard", "verify", tmp_path / "out", "--stock").status == 1
    assert "shard-000000.tar" in damaged.err
    assert ": 1 problem; expected" in damaged.err


def test_yolo_and_voc_labels_become_a_data_set(detr: Detr, tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "train" / "12.jpg")
    (tmp_path / "labels" / "train" / "12.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    result = detr("shard", "yolo", "--root", ".", "--split", "train", "--out", "yolo", "--workers", "0")
    assert (result.status, result.err) == (0, "")
    assert f"data set    {tmp_path.name}-train in {tmp_path}/yolo" in result.out
    xml = "<annotation><object><name>dog</name><difficult>1</difficult><bndbox><xmin>11</xmin><ymin>8</ymin>"
    xml += "<xmax>30</xmax><ymax>23</ymax></bndbox></object></annotation>"
    (tmp_path / "images" / "train" / "12.xml").write_text(xml)
    result = detr("shard", "voc", "--root", "images/train", "--out", "voc", "--limit", "1", "--zero-based")
    assert (result.status, result.err) == (0, "")
    assert "annotations 1 (1 crowd regions)" in result.out
    result = detr("shard", "info", "voc")
    assert "classes     20" in result.out
    assert "categories  1 aeroplane, 2 bicycle" in result.out


def test_bad_labels_are_reported_and_left_out_on_request(detr: Detr, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "12.jpg")
    (tmp_path / "labels" / "12.txt").write_text("1 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.5 0.5\n")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    argv = "shard", "yolo", "--root", ".", "--out", "o", "--workers", "0", "--categories", "names.txt"
    result = detr(*argv)
    assert result.status == 1
    assert result.err.splitlines()[-1].startswith(
        "detr: .: 1 defect: labels/12.txt line 2: got class 7, expected one of the 2"
    )
    assert not (tmp_path / "o").exists()
    result = detr(*argv, "--on-defect", "quarantine")
    assert result.status == 0
    assert "WARNING: left out 0 of 1 images and 1 of 2 annotations" in result.err


def test_two_data_sets_are_put_side_by_side(detr: Detr, tiny_data: TinyData) -> None:
    result = detr("shard", "info", tiny_data.train, "--against", tiny_data.val)
    assert (result.status, result.err) == (0, "")
    rows = [re.split(r"  +", line) for line in result.out.splitlines()]
    assert ["", "group", "this data set", "the other"] in rows
    images = [row for row in rows if (len(row) > 4 and row[0] == "") or row[0] == "objects per image"]
    assert images[0][:2] == ["objects per image", "0"]
    assert sum(int(row[2]) for row in images[:8]) == 12
    assert ["", "distance", "by chance"] in rows


@pytest.mark.parametrize(("field", "status"), [("color", 0), ("isthing", 1)])
def test_data_sets_side_by_side_may_differ_in_colours_only(detr: Detr, tmp_path: Path, field: str, status: int) -> None:
    source = make_panoptic(tmp_path)
    train = source.write("train").url
    source.data["categories"][1][field] = {"color": [1, 2, 3], "isthing": 0}[field]
    assert detr("shard", "info", train, "--against", source.write("val").url).status == status


def test_tars_are_indexed_in_their_folder(detr: Detr, tiny_data: object, tmp_path: Path) -> None:
    shutil.copytree(tiny_data.val, tmp_path / "tars")  # type: ignore[attr-defined]
    before = detr("shard", "info", "tars")
    (tmp_path / "tars" / "manifest.json").unlink()
    result = detr("shard", "index", "tars", "--name", "val", "--workers", "0")
    assert (result.status, result.err) == (0, "")
    assert "data set    val in" in result.out
    counts = [line for line in before.out.splitlines() if line.startswith(("images ", "annotations ", "classes  "))]
    assert set(counts) <= set(result.out.splitlines())
    assert detr("shard", "verify", "tars").status == 0
    assert "is a data set already" in detr("shard", "index", "tars").line

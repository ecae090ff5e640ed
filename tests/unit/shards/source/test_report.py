"""The report of defects, and the table that a command prints."""

import json

import pytest

from shards.errors import ShardError
from shards.source.defects import Defect, SourceError
from shards.source.report import DefectReport, defect_table, load_report, make_report, parse_report


def test_the_report_of_a_failed_write_is_removed_by_a_later_success(coco):
    content = (coco.images / "picture 0.jpg").read_bytes()
    (coco.images / "picture 0.jpg").write_bytes(content[:-300])
    with pytest.raises(SourceError):
        coco.write()
    (coco.images / "picture 0.jpg").write_bytes(content)
    coco.write()
    assert not (coco.root / "out.report.json").exists()


def test_defects_beyond_the_limit_are_ignored(coco):
    coco.data["annotations"][7]["bbox"] = None  # of image 142, the last
    (coco.images / "picture 5.jpg").unlink()  # image 135
    manifest = coco.write(limit=5)
    assert manifest.images == 5
    report = load_report(manifest)
    assert (report.images_listed, report.annotations_listed) == (5, 6)
    assert not any(defect.rejected for defect in report.defects)


def test_the_table_counts_each_kind_and_names_the_first_ids():
    defects = [Defect("", "grey", number) for number in range(9)] + [Defect("", "box-negative", 7, 70)]
    lines = defect_table(defects).splitlines()
    assert lines[1].split() == ["box-negative", "rejected", "1", "image", "7", "(annotation", "70)"]
    assert lines[2].split(maxsplit=3) == ["grey", "noted", "9", "image 0, image 1, image 2, image 3, ..."]
    assert defect_table([]) == ""


def test_a_report_can_be_parsed_from_its_json():
    defects = [Defect("b", "grey", 5), Defect("a", "truncated", 3), Defect("c", "malformed")]
    report = make_report("quarantine", defects, (9, 8), (7, 6))
    assert parse_report(report.to_json(), "x") == report
    assert [defect.text for defect in report.defects] == ["c", "a", "b"]
    assert [(kind.kind, kind.severity) for kind in report.kinds] == [
        *(("malformed", "rejected"), ("truncated", "rejected"), ("grey", "noted"))
    ]
    with pytest.raises(ShardError, match=r"where: .*expected a report"):
        parse_report(b"{}", "where")
    assert isinstance(report, DefectReport)


def test_a_report_states_kind_and_severity_of_every_defect():
    defects = [Defect("a", "malformed", 3), Defect("b", "grey", 5)]
    entries = json.loads(make_report("fail", defects, (9, 8), (7, 6)).to_json())["defects"]
    assert [(entry["kind"], entry["severity"]) for entry in entries] == [("malformed", "rejected"), ("grey", "noted")]


def test_messages_show_huge_numbers_with_few_digits(coco):
    coco.data["annotations"][1]["bbox"] = [1, 1.25, 1e300, 1e300]
    coco.data["annotations"][1]["area"] = 5
    report = load_report(coco.write())
    texts = [defect.text for defect in report.defects if defect.kind == "box-outside" and defect.annotation_id == 12]
    assert texts == [
        "annotation 12 of image 107: its box [1, 1.25, 1e+300, 1e+300] reaches 1e+300 pixels beyond the image"
    ]

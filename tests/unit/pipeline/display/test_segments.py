"""Pictures and tables of panoptic segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.display.run_report import segments_section
from pipeline.display.segments import gains_picture, overlay, quality_tables, segments_sheet
from pipeline.evaluation.panoptic import FoundSegments, PanopticScore
from shards.dataset.categories import Category
from shards.panoptic.segment_png import write_png
from shards.read.sample import SampleReader
from shards.score.panoptic_quality import count, in_columns, quality_of
from tests.support.panoptic_data import make_panoptic

CATEGORIES = (Category(18, "dog", True, (200, 100, 0)), Category(200, "sky", False, (0, 0, 250)))
GREY = Image.new("RGB", (400, 200), (100, 100, 100))


def test_segments_are_tinted_with_the_colours_of_their_categories_and_outlined() -> None:
    indices = np.full((200, 400), -1, np.int32)
    indices[:, 100:200], indices[:, 200:] = 0, 1
    pixels = np.asarray(overlay(GREY, indices, [1, 0], CATEGORIES)).astype(int)
    assert pixels[5, 50].tolist() == [100, 100, 100]  # no segment
    assert pixels[5, 150].tolist() == [40, 40, 190]
    assert pixels[5, 350].tolist() == [160, 100, 40]
    assert pixels[5, 200].tolist() == [255, 255, 255]


def test_two_things_of_a_class_have_different_shades() -> None:
    indices = np.zeros((200, 400), np.int32)
    indices[:, 200:] = 1
    pixels = np.asarray(overlay(GREY, indices, [0, 0], CATEGORIES)).astype(int)
    assert pixels[5, 50].tolist() != pixels[5, 350].tolist()


def test_small_pictures_are_enlarged_and_categories_without_a_colour_get_one() -> None:
    picture = overlay(Image.new("RGB", (40, 20)), np.zeros((20, 40), np.int32), [0], (Category(1, "a", True),))
    assert picture.size == (320, 160)
    assert np.asarray(picture)[4, 4].any()


def test_a_sheet_shows_what_was_found_beside_the_truth(tmp_path: Path) -> None:
    manifest = make_panoptic(tmp_path).write()
    sky = [category.name for category in manifest.categories].index("sky")
    found = {3: FoundSegments(write_png(np.ones((20, 30), np.int32)), (sky,))}
    sheet = segments_sheet(manifest, found, 2)
    assert sheet.width == 1280
    pixels = np.asarray(sheet)
    empty = np.asarray(segments_sheet(manifest, {}, 2))
    changed = np.argwhere((pixels != empty).any(axis=2))
    assert len(changed) > 5000
    assert changed[:, 1].max() < 330  # the left picture of image 3, the first one


def test_tables_and_chart_say_what_pq_is_made_of(tmp_path: Path) -> None:
    manifest = make_panoptic(tmp_path).write()
    reader = SampleReader(manifest)
    row = int(manifest.index().rows_of(np.array([12]))[0])
    truth = reader.segments(row)
    reader.close()
    sky, car = (
        next(label for label, category in enumerate(manifest.categories) if category.name == name)
        for name in ("sky", "car")
    )
    indices = np.zeros(truth.ids.shape, np.int32)
    indices[:2] = 1
    counts = in_columns([count(truth, indices, [sky, car])])
    score = quality_of(counts, [bool(entry.isthing) for entry in manifest.categories])
    tables = quality_tables(score, manifest.categories)
    classes = tables["per_class_pq.json"]
    assert classes["name"] == ["car", "sky"]
    assert classes["kind"] == ["thing", "stuff"]
    assert classes["PQ"] == [0, 0.9]
    assert (classes["matched"], classes["missed"], classes["false"]) == ([0, 1], [0, 0], [1, 0])
    gained = dict(zip(*tables["panoptic_errors.json"].values(), strict=True))
    assert gained["false: nothing is there"] == 0.5
    assert gains_picture(score).size == (640, 280)
    section = segments_section(manifest, PanopticScore(score, {}, counts))
    assert "<td>things<td class=number>0.000" in section.replace("</td>", "")

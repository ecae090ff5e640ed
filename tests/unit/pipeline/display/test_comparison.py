"""Tables and the picture of a difference."""

from dataclasses import replace

import numpy as np

from pipeline.display.comparison import difference_picture, difference_tables, verdict
from pipeline.display.draw import Line, chart
from shards.score.difference import Change, Difference


def classes(count):
    return tuple(Change(f"class {n}", 0.5, 0.5 + n / 1000, n / 1000 - 0.01, n / 1000 + 0.01, 10) for n in range(count))


FOUND = Difference(
    figures=(
        Change("AP", 0.4, 0.41, 0.004, 0.016),
        Change("AP50", 0.6, 0.59, -0.02, -0.001),
        Change("AP75", 0.4, 0.41, -0.001, 0.02),
        Change("APs", -1.0, -1.0, 0.0, 0.0),
    ),
    classes=classes(3),
    before_runs=(0.4,),
    after_runs=(0.41,),
    images=500,
    draws=1000,
)


def test_an_interval_without_zero_is_better_or_worse() -> None:
    assert [verdict(change) for change in FOUND.figures[:3]] == ["better", "worse", "within chance"]


def test_a_class_in_few_images_has_no_verdict() -> None:
    change = Change("rare", 0.1, 0.9, 0.8, 0.8, 3, images=1)
    assert verdict(change) == "few images"
    assert verdict(replace(change, images=20)) == "better"
    text = difference_tables(replace(FOUND, classes=(change,)))
    assert "few images: a class in fewer than 20 images" in text
    assert "few images" not in difference_tables(FOUND)


def test_figures_are_a_line_each_and_those_without_truth_are_dashes() -> None:
    lines = difference_tables(FOUND).splitlines()
    assert lines[2].split() == ["AP", "0.4000", "0.4100", "+0.0100", "+0.0040", "to", "+0.0160", "better"]
    assert lines[5].split() == ["APs", "-", "-", "-", "-", "-"]


def test_many_classes_have_their_largest_changes_shown_from_worst_to_best() -> None:
    text = difference_tables(replace(FOUND, classes=classes(50)))
    assert text.count("class ") == 20 + 1
    assert text.index("class 30") < text.index("class 49")
    assert "... and 30 classes that change less" in text
    assert "by chance alone about 2 of 50 classes" in text
    assert "by chance alone" not in difference_tables(FOUND)


def test_runs_of_a_side_have_a_mean_and_a_deviation() -> None:
    assert "deviation" not in difference_tables(FOUND)
    text = difference_tables(replace(FOUND, before_runs=(0.40, 0.42, 0.41), after_runs=(0.5, 0.51)))
    assert "before  AP of 3 runs: 0.4000, 0.4200, 0.4100; mean 0.4100, deviation 0.0100" in text
    assert "AP changes by +0.07" in text
    assert "Welch" not in difference_tables(replace(FOUND, before_runs=(0.40, 0.42)))


def test_the_picture_has_a_row_for_each_class() -> None:
    few, many = (difference_picture(replace(FOUND, classes=classes(count)), "a to b") for count in (5, 25))
    assert many.height > few.height + 400
    colours = {tuple(pixel) for pixel in np.asarray(few).reshape(-1, 3).tolist()}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0x99, 0x99, 0x99)} <= colours


def test_dollar_signs_in_names_begin_no_formula() -> None:
    named = (replace(FOUND.classes[0], name=r"$\pay$ in a_b^c$"),)
    assert difference_picture(replace(FOUND, classes=named), r"$\a$ to $\b$").width == 1300
    lines = [Line(r"$\frac$", "#BBBBBB", [0.0, 1.0])]
    assert chart(lines, [0.0, 1.0], r"$\x$", r"$\y$").width == 640

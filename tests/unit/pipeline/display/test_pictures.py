import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.display.pictures import curves_picture, curves_table
from shards.score.precision_recall import RECALLS, UNSCORED, Curves

STEP = tuple(1.0 if recall < 0.5 else 0.25 for recall in RECALLS)
FLAT = (0.5,) * 101
CURVES = Curves((0.1,) * 101, STEP, FLAT)


def drawn(picture: Image.Image, colour: str, x: float) -> float:
    """Return the value in 0..1 at which a line of the colour crosses `x`, measured in the chart of 640 by 480."""
    column = np.asarray(picture).astype(int)[48:415, round(64 + x * 560)]
    (rows,) = np.nonzero(np.abs(column - ImageColor.getrgb(colour)).sum(axis=1) < 60)
    assert len(rows)
    return float(1 - rows.mean() / 372)


@pytest.mark.parametrize("x", [0.1, 0.3, 0.7, 0.9])
def test_lines_are_drawn_at_their_values(x: float) -> None:
    picture = curves_picture(CURVES)
    assert picture.size == (640, 480)
    assert drawn(picture, "#0072B2", x) == pytest.approx(1.0 if x < 0.5 else 0.25, abs=0.01)
    assert drawn(picture, "#D55E00", x) == pytest.approx(0.5, abs=0.01)
    assert drawn(picture, "black", x) == pytest.approx(0.1, abs=0.01)


def test_a_chart_without_scores_has_axes_but_no_lines() -> None:
    inside = np.asarray(curves_picture(UNSCORED))[58:413, 76:614]
    assert inside.min() > 200  # the grid alone
    assert np.asarray(curves_picture(CURVES))[58:413, 76:614].min() < 50


def test_the_chart_of_masks_is_to_the_right_of_boxes() -> None:
    picture = curves_picture(CURVES, UNSCORED)
    alone = np.asarray(curves_picture(CURVES))
    pixels = np.asarray(picture)[-480:]
    assert (pixels[:, :640] == alone).all()
    assert (pixels[:, -640:] == np.asarray(curves_picture(UNSCORED))).all()


def test_the_table_has_a_row_for_each_recall() -> None:
    table = curves_table(CURVES)
    assert table == {
        "recall": list(RECALLS),
        "precision": [0.1] * 101,
        "precision50": list(STEP),
        "precision75": list(FLAT),
    }
    masks = curves_table(UNSCORED, CURVES)
    assert masks["precision50"] == [-1.0] * 101
    assert masks["mask_precision50"] == list(STEP)
    assert len(masks) == 7

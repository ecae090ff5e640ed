import numpy as np
import pytest
from PIL import Image

from pipeline.display.draw import Boxes, contact_sheet, draw, side_by_side

GREY = (128, 128, 128)
ORANGE = (0xE6, 0x9F, 0x00)


def marked(picture: Image.Image) -> np.ndarray:
    """Return a mask of the pixels that are no longer grey in a picture of a grey image."""
    return (np.asarray(picture) != GREY).any(axis=2)


def one(box: tuple[float, float, float, float], name: str = "", score: float | None = None) -> Boxes:
    return Boxes(np.array([box]), [0], [name], None if score is None else [score])


def test_a_box_is_drawn_along_its_sides_only() -> None:
    picture = draw(Image.new("RGB", (400, 300), GREY), one((100, 150, 200, 250)))
    assert picture.size == (400, 300)
    pixels = np.asarray(picture)
    for x, y in ((100, 200), (200, 200), (150, 150), (150, 250)):
        assert tuple(pixels[y, x]) == ORANGE
    assert not marked(picture)[160:240, 110:190].any()
    assert not marked(picture)[260:].any()
    assert not marked(picture)[:, 210:].any()


def test_masks_are_blended_half_with_the_colour_of_their_object() -> None:
    inside = np.zeros((2, 300, 400), bool)
    inside[0, 160:240, 110:190] = True
    inside[1, 200:240, 150:300] = True
    boxes = Boxes(np.array([[100.0, 150, 200, 250]] * 2), [0, 1], ["", ""], masks=inside)
    pixels = np.asarray(draw(Image.new("RGB", (400, 300), GREY), boxes))
    tinted = tuple((grey + orange) // 2 for grey, orange in zip(GREY, ORANGE, strict=True))
    assert tuple(pixels[170, 120]) == tinted
    assert tuple(pixels[220, 250]) not in (GREY, tinted)
    assert tuple(pixels[220, 170]) not in (tinted, tuple(pixels[220, 250]))  # both masks are seen
    assert tuple(pixels[170, 250]) == GREY


def test_the_masks_of_a_small_image_are_enlarged_with_it() -> None:
    inside = np.zeros((1, 64, 96), bool)
    inside[0, 40, 30] = True
    picture = draw(Image.new("RGB", (96, 64), GREY), Boxes(np.array([[4.0, 4, 90, 60]]), [0], [""], masks=inside))
    assert marked(picture)[160:164, 120:124].all()
    assert not marked(picture)[164:200, 100:200].any()


def test_nothing_is_drawn_without_boxes() -> None:
    image = Image.new("RGB", (400, 300), GREY)
    empty = Boxes(np.zeros((0, 4)), [], [], [])
    assert not marked(draw(image, empty)).any()
    assert draw(image, empty) is not image


@pytest.mark.parametrize(
    "box", [(-50, -20, 500, 400), (390, 290, 700, 900), (-30, -30, -10, -10), (500, 100, 600, 120), (50, 50, 50, 50)]
)
def test_a_box_beyond_the_image_is_clipped(box: tuple[float, float, float, float]) -> None:
    picture = draw(Image.new("RGB", (400, 300), GREY), one(box, "a long name of a category", 0.75))
    assert picture.size == (400, 300)
    assert marked(picture).any()


def test_a_small_image_is_enlarged_with_its_boxes() -> None:
    picture = draw(Image.new("RGB", (96, 64), GREY), one((24, 32, 48, 56)))
    assert picture.size == (96 * 4, 64 * 4)
    pixels = np.asarray(picture)
    for x, y in ((24, 44), (48, 44), (36, 32), (36, 56)):
        assert tuple(pixels[4 * y, 4 * x]) == ORANGE
    assert not marked(picture)[34 * 4 : 54 * 4, 26 * 4 : 46 * 4].any()


def test_the_detection_with_the_highest_score_is_on_top() -> None:
    same = np.array([[100.0, 100, 200, 200]] * 2)
    picture = draw(Image.new("RGB", (400, 300), GREY), Boxes(same, [0, 1], ["a", "b"], [0.9, 0.6]))
    assert tuple(np.asarray(picture)[150, 100]) == ORANGE


def test_grey_images_are_drawn_in_colour() -> None:
    picture = draw(Image.new("L", (400, 300), 128), one((100, 150, 200, 250)))
    assert picture.mode == "RGB"


def test_two_pictures_are_side_by_side_under_captions() -> None:
    joined = side_by_side(Image.new("RGB", (50, 40), "red"), Image.new("RGB", (50, 40), "blue"), ("found", "truth"))
    pixels = np.asarray(joined)
    assert tuple(pixels[-1, 0]) == (255, 0, 0)
    assert tuple(pixels[-1, -1]) == (0, 0, 255)
    assert (pixels[:20, :50] < 100).any()


def test_a_contact_sheet_has_every_picture() -> None:
    colours = ["red", "lime", "blue"]
    sheet = contact_sheet([Image.new("RGB", (100, 50), colour) for colour in colours], columns=2, width=200)
    assert sheet.size == (200, 100)
    pixels = np.asarray(sheet)
    assert [tuple(pixels[y, x]) for x, y in ((50, 25), (150, 25), (50, 75))] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert contact_sheet([]).width == 1280

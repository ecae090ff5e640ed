"""Decoding of images that are not plain RGB: pixels, notes and warnings."""

import io
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from shards.read.sample import decode
from shards.source.images import COLOURS, ImageSource, UnusableImage, inspect_image, read_image

RAMP = np.array([[0, 255, 256, 40000, 65535]], np.uint16)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_16_bit_grey_png_keeps_its_shades_and_is_noted():
    content = encoded(Image.fromarray(RAMP), "PNG")
    assert decode(content).tolist() == [[[shade] * 3 for shade in (0, 0, 1, 156, 255)]]
    assert inspect_image(content).colours == "16-bit"


@pytest.mark.parametrize(
    "pixels",
    [np.linspace(0, 1, 6, dtype=np.float32), np.arange(6, dtype=np.int32) << 20, np.arange(6, dtype=np.uint16) << 12],
)
def test_other_grey_images_of_more_than_8_bits_are_refused(pixels):
    content = encoded(Image.fromarray(pixels.reshape(2, 3)), "TIFF")
    with pytest.raises(UnusableImage) as caught:
        inspect_image(content)
    assert caught.value.args[0] == "unknown-format"
    assert "grey of more than 8 bits" in caught.value.args[1]
    with pytest.raises(ValueError, match="grey of more than 8 bits"):
        decode(content)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_and_noted(mode, tmp_path):
    image = Image.new(mode, (4, 3), (9, 9, 9, 7)[-len(mode) :])
    (tmp_path / "a.png").write_bytes(encoded(image, "PNG"))
    found = read_image(str(tmp_path), ImageSource(5, "a.png", 4, 3))
    assert found.sound
    assert [(defect.kind, defect.image_id) for defect in found.defects] == [("alpha", 5)]
    assert found.defects[0].text == f"image 5 (a.png): {COLOURS['alpha']}"
    assert (decode(found.content) == 9).all()


def test_a_palette_image_is_noted_only_if_it_is_transparent():
    palette = Image.new("P", (4, 3))
    assert inspect_image(encoded(palette, "PNG")).colours == ""
    assert inspect_image(encoded(palette, "PNG", transparency=0)).colours == "alpha"


def test_threads_do_not_change_the_warning_filters():
    """`catch_warnings` would, if threads leave it in another order than they entered it."""
    content = encoded(Image.new("RGB", (30, 30)), "PNG")
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: inspect_image(content), range(600)))
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


def test_a_large_image_raises_no_warning():
    """In a process of its own, because pytest resets the warning filters for every test."""
    code = (
        "import sys; from PIL import Image; from shards.source.images import inspect_image; Image.MAX_IMAGE_PIXELS = 500\n"
        "print(inspect_image(sys.stdin.buffer.read()).size)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        input=encoded(Image.new("RGB", (30, 30)), "PNG"),
        capture_output=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (b"(30, 30)\n", b"")

"""Measure the cost of writing a data set: reading a JSON of COCO's size, and writing images to tars.

Each side runs in a process of its own, in turn, and prints its CPU seconds and peak memory.
`python -m tests.bench.writing SIDE FOLDER` is such a process.
"""

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

from shards.dataset.tars import BLOCK, TarMember
from tests.support.real_data import COCO_TINY

Row = dict[str, Any]
STOCK = "no decoding, webdataset's tars"
IMAGES, ANNOTATIONS, JSON_BYTES = 118_287, 860_001, 448e6  # of COCO's instances_train2017.json
REPEATS = 12  # writes of all images in one process


def parsing(device: str, rounds: int) -> list[Row]:
    """Read a generated file of the size of COCO's annotations into columns, and into pycocotools' `COCO`."""
    with tempfile.TemporaryDirectory() as folder:
        size = _generate(Path(folder) / "instances.json")
        title = f"annotations, {size / 1e6:.0f} MB of JSON"
        return _compare(title, ("read_source", "pycocotools"), "pycocotools", Path(folder), rounds)


def writing(device: str, rounds: int) -> list[Row]:
    """Write COCO images to shards with and without decoding them and with webdataset's writer; compare with a copy."""
    with tempfile.TemporaryDirectory() as folder:
        title = f"writing {REPEATS} x {len(_files())} COCO images"
        sides = ("plain copy", "shards, no decoding", STOCK, "shards")
        return _compare(title, sides, "plain copy", Path(folder), rounds)


def _compare(title: str, sides: tuple[str, ...], reference: str, folder: Path, rounds: int) -> list[Row]:
    found: dict[str, list[Row]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, "-m", "tests.bench.writing", side, str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for side, times in found.items():
        ratios = [own["cpu_s"] / base["cpu_s"] for own, base in zip(times, found[reference], strict=True)]
        peak = statistics.median(result["peak_bytes"] for result in times)
        base_peak = statistics.median(result["peak_bytes"] for result in found[reference])
        row = {
            "case": title,
            "side": side,
            "median_cpu_s": statistics.median(result["cpu_s"] for result in times),
            "best_cpu_s": min(result["cpu_s"] for result in times),
            "cpu_ratio": statistics.median(ratios),
            "peak_bytes": peak,
            "peak_ratio": peak / base_peak,
        }
        rows.append(row)
        print(
            f"{title:45} {side:31} median {row['median_cpu_s']:6.2f} CPU s, best {row['best_cpu_s']:6.2f}, "
            f"x{row['cpu_ratio']:.3f} ({1 / row['cpu_ratio']:.2f} times as fast); peak {peak / 2**20:5.0f} MiB, "
            f"x{row['peak_ratio']:.2f}",
            flush=True,
        )
    return rows


def _generate(path: Path) -> int:
    """Write a COCO JSON with the original's number of images, annotations and bytes; return its size."""
    rng = random.Random(0)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    segmentation_bytes = (JSON_BYTES - IMAGES * 250) / ANNOTATIONS - 177
    outlines = []
    for _ in range(997):
        outline: list[float] = []
        while len(json.dumps(outline)) < segmentation_bytes * rng.uniform(0.9, 1.1):
            outline += [round(rng.uniform(0, 640), 2) for _ in range(6)]
        outlines.append(json.dumps([outline]))
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for number in range(IMAGES):
            name = f"{number:012d}.jpg"
            url = f"http://farm8.staticflickr.com/{rng.randrange(10**4)}/{rng.randrange(10**10)}_{number:010x}_z.jpg"
            image = {"license": 2, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}"}
            image |= {"height": 480, "width": 640, "date_captured": "2013-11-20 02:07:55", "flickr_url": url}
            file.write((", " if number else "") + json.dumps(image | {"id": number}))
        file.write('], "annotations": [')
        for number in range(ANNOTATIONS):
            x, y = rng.randrange(30000) / 100, rng.randrange(20000) / 100
            width, height = rng.randrange(100, 30000) / 100, rng.randrange(100, 20000) / 100
            area = width * height * 0.7
            text = (
                f'{{"segmentation": {outlines[number % 997]}, "area": {area}, "iscrowd": 0, '
                f'"image_id": {number * 7919 % IMAGES}, "bbox": [{x}, {y}, {width}, {height}], '
                f'"category_id": {number % 80 + 1}, "id": {900_000 + number}}}'
            )
            file.write((", " if number else "") + text)
        categories = [
            {"supercategory": "thing", "id": number, "name": letters[number % 26] * 9} for number in range(1, 81)
        ]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path.stat().st_size


def _files() -> list[Path]:
    return sorted((COCO_TINY / "train2017").iterdir()) + sorted((COCO_TINY / "val2017").iterdir())


def _pycocotools(folder: Path) -> Callable[[], object]:
    from pycocotools.coco import COCO

    return lambda: COCO(str(folder / "instances.json"))


def _read_source(folder: Path) -> Callable[[], object]:
    """Include sha256 and checks, but not the search for image files, which pycocotools does not do either."""
    from shards.source import coco

    coco._file_finder = lambda _: lambda name: True  # type: ignore[assignment]
    return lambda: coco.read_source(folder, folder / "instances.json")


def _plain(folder: Path) -> Callable[[], object]:
    files = _files()

    def work() -> str:
        digest = hashlib.sha256()
        with (folder / "plain").open("wb") as out:
            for path in files:
                content = path.read_bytes()
                digest.update(content)
                out.write(content)
            out.flush()
            os.fsync(out.fileno())
        return digest.hexdigest()

    return work


def _shards(folder: Path, decode: bool) -> Callable[[], object]:
    """Go from columns to tars and index; the fixed costs of a write are left out."""
    import shutil

    from shards.dataset import index as dataset_index
    from shards.source import images
    from shards.source.coco import read_source
    from shards.write import index_records, writer
    from shards.write import shard as shard_writer
    from shards.write.staging import staging

    splits = [
        (read_source(COCO_TINY / f"{name}2017", COCO_TINY / "annotations" / f"instances_{name}2017.json"), name)
        for name in ("train", "val")
    ]

    def without_decoding(url: str, source: Any) -> Any:
        content = images.read_content(url, source.name) or b""
        return images.ImageFile(content, images.checksum(content), "jpg", ())

    def work() -> None:
        for source, name in splits:
            reading = patch.object(shard_writer, "read_image", images.read_image if decode else without_decoding)
            with reading, staging(str(folder / name), "key") as stage:
                written = list(writer._write_shards(source, stage, writer.WriteConfig(), None, None))
                index, rows = index_records.image_records(source, written)
                for columns in (index, index_records.annotation_records(source, rows)):
                    dataset_index.npy(columns)
            shutil.rmtree(folder / name)

    return work


class _StockTarWriter:
    """The package's `TarWriter` on top of webdataset's."""

    def __init__(self, file: BinaryIO) -> None:
        import webdataset

        self._file = file
        self._digest = hashlib.sha256()
        self._tar = webdataset.TarWriter(
            self, user="root", group="root", mode=0o444, mtime=0, encoder=False, compress=False
        )
        self.bytes = 0

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.bytes += len(piece)

    def add(self, name: str, content: bytes, crc32: int | None = None) -> TarMember:
        crc32 = zlib.crc32(content) if crc32 is None else crc32
        key, _, ending = name.partition(".")
        member = TarMember(name, self._tar.tarstream.offset + BLOCK, len(content), crc32)
        self._tar.write({"__key__": key, ending: content})
        return member

    def finish(self) -> str:
        self._tar.close()
        self._file.flush()
        return self._digest.hexdigest()


def _stock_shards(folder: Path) -> Callable[[], object]:
    from shards.write import shard as shard_writer

    shard_writer.TarWriter = _StockTarWriter  # type: ignore[misc,assignment]
    return _shards(folder, False)


SIDES: dict[str, Callable[[Path], Callable[[], object]]] = {
    "read_source": _read_source,
    "pycocotools": _pycocotools,
    "plain copy": _plain,
    "shards, no decoding": lambda folder: _shards(folder, False),
    STOCK: _stock_shards,
    "shards": lambda folder: _shards(folder, True),
}


def _side(name: str, folder: Path) -> None:
    work = SIDES[name](folder)
    once = name in ("read_source", "pycocotools")
    if not once:
        work()  # fill the page cache, import modules
    start = time.process_time()
    for _ in range(1 if once else REPEATS):
        work()
    seconds = time.process_time() - start
    print(json.dumps({"cpu_s": seconds, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Return the peak memory of this process; `ru_maxrss` would include that of its parent before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    _side(sys.argv[1], Path(sys.argv[2]))

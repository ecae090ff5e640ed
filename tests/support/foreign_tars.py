"""Helpers to write WebDataset tars of samples like other programs do, and to index them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.config import IndexConfig
from shards.dataset.manifest import Manifest
from shards.foreign.index_tars import index_tars


def picture(width: int = 40, height: int = 30, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def thing(*box: float, **more: Any) -> dict[str, Any]:
    return {"bbox": list(box), "category_id": 3} | more


def tar(path: Path, *files: tuple[str, Any], end: bool = True) -> None:
    """Write a tar of these files, encoding contents other than bytes as JSON; `end`: with end-of-archive blocks."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for name, content in files:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        length = out.offset
    if not end:
        path.write_bytes(path.read_bytes()[:length])


def index(folder: Path | str, **config: Any) -> Manifest:
    return index_tars(folder, IndexConfig(**config))

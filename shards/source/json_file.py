"""The top level of a COCO JSON, whose lists stay undecoded, so that one pass over the file finds all entries."""

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from shards.errors import ShardError
from shards.source.columns import Texts
from shards.source.folder import require

_Top = dict[str, list[msgspec.Raw] | dict[str, msgspec.Raw] | str | int | float | bool | None]
INSTANCES = "COCO's instances format"
PANOPTIC = "COCO's panoptic format"


def open_json(path: Path, form: str) -> mmap.mmap:
    """Map a JSON file into memory; raise `ShardError` if there is none. `form` is the expected format, for messages."""
    require(path, "COCO JSON file")
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ShardError(f"{path}: is empty; expected {form}")
        # Mapped and not read: this saves a copy of half a gigabyte, and the system can reclaim the memory.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def refuse_deep_nesting(path: Path, form: str) -> Iterator[None]:
    """Raise `ShardError` when the block meets JSON that nests too deeply."""
    try:
        yield
    except RecursionError:
        raise ShardError(f"{path}: brackets are nested too deeply; expected {form}") from None


def read_top(path: Path, content: bytes | mmap.mmap, form: str) -> tuple[dict[str, Any], dict[str, Texts]]:
    """Return the top level of a COCO JSON, and the lists of its images, annotations and categories."""
    top = _top_level(path, content, form)
    return top, {key: _list(path, key, top[key], form) for key in ("images", "annotations", "categories")}


def _top_level(path: Path, content: bytes | mmap.mmap, form: str) -> dict[str, Any]:
    try:
        top = _decode_top(content)
    except msgspec.ValidationError:
        raise ShardError(f"{path}: not a JSON object; expected {form}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        top = _lenient(path, content, form)
    missing = [key for key in ("images", "annotations", "categories") if key not in top]
    if missing:
        raise ShardError(
            f"{path}: not {form}: has no {' and no '.join(map(repr, missing))}; expected 'images', "
            "'annotations' and 'categories'"
        )
    return top


def _decode_top(content: bytes | mmap.mmap) -> dict[str, Any]:
    return msgspec.json.decode(content, type=_Top)


def _lenient(path: Path, content: bytes | mmap.mmap, form: str) -> dict[str, Any]:
    """Decode Python's NaN and Infinity, which JSON does not allow, as text, so that a defect names the entry."""
    try:
        return _decode_top(msgspec.json.encode(json.loads(bytes(content), parse_constant=str)))
    except msgspec.ValidationError:
        raise ShardError(f"{path}: not a JSON object; expected {form}") from None
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}); expected {form}") from None


def _list(path: Path, key: str, value: Any, form: str) -> Texts:
    if not isinstance(value, list):
        raise ShardError(f"{path}: its {key!r} are no list; expected {form}")
    return value


def without_entries(top: Mapping[str, Any]) -> bytes:
    """Return the compact JSON of a COCO file's top level without images and annotations."""
    rest = {key: value for key, value in top.items() if key not in ("images", "annotations")}
    return msgspec.json.format(msgspec.json.encode(rest), indent=-1)

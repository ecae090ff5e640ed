"""Categories of formats that do not bring them along, from a file that a user names."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from shards.errors import ShardError
from shards.manifest import Category


class _Category(msgspec.Struct):
    id: int
    name: str


class _Categories(msgspec.Struct):
    categories: list[_Category]


def numbered(names: Iterable[str], first_id: int) -> tuple[Category, ...]:
    """Categories of these names with ids from ``first_id``."""
    return tuple(Category(number, name) for number, name in enumerate(names, first_id))


def read_categories(path: Path, first_id: int) -> tuple[Category, ...]:
    """Categories from a COCO JSON, a JSON list of names, or a text of one name a line.

    Names without ids get ids from ``first_id``. Raises ShardError where the file is none of these.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error}; expected a file with the names of categories") from None
    return parse_categories(str(path), content, first_id)


def parse_categories(name: str, content: bytes, first_id: int) -> tuple[Category, ...]:
    """As ``read_categories``, of the content of the file ``name``."""
    if not name.lower().endswith(".json"):
        return numbered(_lines(name, content), first_id)
    try:
        found = msgspec.json.decode(content, type=list[str] | _Categories)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{name}: {error}; expected a COCO JSON with 'categories', or a list of names") from None
    if isinstance(found, list):
        return numbered(_checked(name, found), first_id)
    ids = [category.id for category in found.categories]
    _checked(name, [category.name for category in found.categories])
    if len(set(ids)) < len(ids):
        raise ShardError(f"{name}: gives a category id twice; expected ids that differ")
    return tuple(Category(one.id, one.name) for one in sorted(found.categories, key=lambda one: one.id))


def _lines(name: str, content: bytes) -> list[str]:
    """One name a line; blank lines count only between names, since a line's number is a label."""
    try:
        lines = content.decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ShardError(f"{name}: {error}; expected names of categories, one a line") from None
    return _checked(name, [line.strip() for line in lines])


def _checked(name: str, names: list[str]) -> list[str]:
    if not names or not all(names) or len(set(names)) < len(names):
        wrong = "no names" if not names else "an empty name" if not all(names) else "a name twice"
        raise ShardError(f"{name}: has {wrong}; expected names of categories that differ")
    return names

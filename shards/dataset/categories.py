"""Reading of categories from a file, for formats that do not contain them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from shards.errors import ShardError


class _Category(msgspec.Struct):
    id: int
    name: str


class _Categories(msgspec.Struct):
    categories: list[_Category]


def categories_from_names(names: Iterable[str], first_id: int) -> tuple[Category, ...]:
    """Return categories of these names with ids from `first_id`."""
    return tuple(Category(number, name) for number, name in enumerate(names, first_id))


def read_categories(path: Path, first_id: int) -> tuple[Category, ...]:
    """Return the categories in a COCO JSON, a JSON list of names, or a text file with one name per line.

    Names without ids get ids from `first_id`. Raise `ShardError` if the file cannot be read or is none of these.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error}; expected a file with the names of categories") from None
    return parse_categories(str(path), content, first_id)


def parse_categories(name: str, content: bytes, first_id: int) -> tuple[Category, ...]:
    """Return the categories in the content of the file `name`, as `read_categories`."""
    if not name.lower().endswith(".json"):
        return categories_from_names(_lines(name, content), first_id)
    try:
        decoded = msgspec.json.decode(content, type=list[str] | _Categories)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{name}: {error}; expected a COCO JSON with 'categories', or a list of names") from None
    if isinstance(decoded, list):
        return categories_from_names(_checked(name, decoded), first_id)
    categories = sorted(decoded.categories, key=lambda category: category.id)
    _checked(name, [category.name for category in categories])
    if len({category.id for category in categories}) < len(categories):
        raise ShardError(f"{name}: gives a category id twice; expected distinct ids")
    return tuple(Category(category.id, category.name) for category in categories)


def _lines(name: str, content: bytes) -> list[str]:
    """Return one name per line; blank lines between names are an error, because a line's number is a label."""
    try:
        lines = content.decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ShardError(f"{name}: {error}; expected names of categories, one per line") from None
    return _checked(name, [line.strip() for line in lines])


def _checked(name: str, names: list[str]) -> list[str]:
    """Return `names` if they are distinct and not empty; raise `ShardError` otherwise."""
    if not names:
        problem = "no names"
    elif not all(names):
        problem = "an empty name"
    elif len(set(names)) < len(names):
        problem = "a name twice"
    else:
        return names
    raise ShardError(f"{name}: has {problem}; expected distinct names of categories")


class Category(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A category: original id and name. Its position in `Manifest.categories` is its label.

    `isthing` is None except in panoptic data sets: there it is true for things, which are counted, and false for stuff.
    `color` is that of the panoptic JSON in RGB, if it gives one.
    """

    id: int
    name: str
    isthing: bool | None = None
    color: tuple[int, int, int] | None = None


def identities(categories: Iterable[Category], *, kinds: bool = False) -> tuple[tuple[int, str, bool | None], ...]:
    """Return what makes categories the same: id and name, and with `kinds` also `isthing`, but never the colour."""
    return tuple((category.id, category.name, category.isthing if kinds else None) for category in categories)


UNNAMED = "N/A"
"""Name of a label without a category: the original's labels are category ids, which have gaps."""

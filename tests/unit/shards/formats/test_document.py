import json

import pytest

from shards.dataset.categories import read_categories
from shards.errors import ShardError
from shards.formats.document import image_ids, image_size


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["2007_000027.jpg", "2012_004331.jpg"], [2007000027, 2012004331]),
        (["a/000000000139.jpg", "b/000000581781.png"], [139, 581781]),
        (["1_23.jpg", "12_3.jpg"], [1, 2]),  # the same number
        (["7.jpg", "street.jpg"], [1, 2]),
        (["7.jpg", "1234567890123.jpg"], [1, 2]),  # more digits than a sample's key has
        (["7.jpg", "٤.jpg"], [1, 2]),
        (["7.jpg", "_.jpg"], [1, 2]),
        ([], []),
    ],
)
def test_ids_are_the_numbers_of_names_or_positions(names, ids):
    assert image_ids(names) == ids


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "cat\n dog \n\n", [(5, "cat"), (6, "dog")]),
        ("a.json", '["cat", "dog"]', [(5, "cat"), (6, "dog")]),
        ("a.JSON", '{"categories": [{"id": 9, "name": "cat", "x": 1}, {"id": 2, "name": "dog"}]}', [(2, "dog"), (9, "cat")]),
    ],
)  # fmt: skip
def test_categories_come_from_text_and_json(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert [(category.id, category.name) for category in read_categories(tmp_path / name, 5)] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "has no names"),
        ("a.txt", "cat\n\ndog", "has an empty name"),
        ("a.txt", "cat\ncat", "has a name twice"),
        ("a.txt", b"\xff", "expected names of categories, one per line"),
        ("a.json", "[1]", "expected a COCO JSON with 'categories', or a list of names"),
        ("a.json", "{", "expected a COCO JSON"),
        ("a.json", '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "gives a category id twice"),
    ],
)
def test_a_file_of_no_categories_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ShardError, match=message) as caught:
        read_categories(tmp_path / name, 1)
    assert "\n" not in str(caught.value)


def test_an_absent_file_of_categories_is_one_line(tmp_path):
    for name in ("gone.txt", "gone.json"):
        with pytest.raises(ShardError, match="No such file"):
            read_categories(tmp_path / name, 1)


def test_error_for_an_unreadable_size_states_the_reason(tmp_path):
    (tmp_path / "a.jpg").write_bytes(json.dumps({}).encode())
    with pytest.raises(ValueError, match=r"its size cannot be read: cannot identify image file 'a\.jpg'"):
        image_size(tmp_path / "a.jpg")

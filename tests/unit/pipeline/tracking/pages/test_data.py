"""Facts about data sets, as MLflow keeps them with a run."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from mlflow.utils.validation import MAX_DATASET_SCHEMA_SIZE

from pipeline.tracking.pages.data import ClassCount, DataSet, data_of_run, data_set, dataset_input
from shards.dataset.manifest import load_manifest

DATA = DataSet(
    name="cats",
    digest="d" * 64,
    url="/data/cats",
    images=3,
    objects=5,
    classes=2,
    source_digest="s" * 64,
    corrections_digest="c" * 64,
    corrections={"relabel": 2},
    by_class=(ClassCount("cat", 1200, 2), ClassCount("dog", 0, 0)),
)


def run_with(*inputs: Any) -> Any:
    return SimpleNamespace(inputs=SimpleNamespace(dataset_inputs=list(inputs)))


def test_a_run_gives_back_the_facts_about_its_data() -> None:
    used = [dataset_input("validation", DATA), dataset_input("training", msgspec.structs.replace(DATA, name="more"))]
    (first, more), (second, same) = data_of_run(run_with(*used))
    assert (first, more.name, second, same) == ("training", "more", "validation", DATA)


def test_the_drawer_of_a_data_set_lists_its_classes() -> None:
    schema = msgspec.json.decode(dataset_input("training", DATA).dataset.schema)
    rows = [(column["name"], column["type"]) for column in schema["mlflow_colspec"]]
    assert rows == [("cat", "1,200 in 2 images"), ("dog", "0 in 0 images")]


def test_of_very_many_classes_the_drawer_lists_the_most_frequent() -> None:
    classes = tuple(ClassCount(f"class {number:05}", number, 1) for number in range(20_000))
    entry = dataset_input("training", msgspec.structs.replace(DATA, by_class=classes))
    assert len(entry.dataset.schema.encode()) <= MAX_DATASET_SCHEMA_SIZE
    *kept, rest = msgspec.json.decode(entry.dataset.schema)["mlflow_colspec"]
    assert len(kept) > 5_000
    assert [column["name"] for column in kept] == [entry.name for entry in classes[-len(kept) :]]
    assert rest["name"] == f"{20_000 - len(kept):,} more classes"
    assert [data.by_class for _, data in data_of_run(run_with(entry))] == [classes[-len(kept) :]]


@pytest.mark.parametrize("schema", [None, "", "text", "[]", '{"mlflow_colspec": [{"name": "x", "type": "long"}]}'])
def test_data_of_another_program_has_no_counts(schema: str | None) -> None:
    entry = dataset_input("training", msgspec.structs.replace(DATA, by_class=()))
    entry.dataset._schema = schema
    assert [data.by_class for _, data in data_of_run(run_with(entry))] == [()]


def test_the_classes_of_a_data_set_are_counted(tiny_data: Any) -> None:
    manifest = load_manifest(tiny_data.train)
    data = data_set(manifest)
    assert [entry.name for entry in data.by_class] == [category.name for category in manifest.categories]
    assert sum(entry.objects for entry in data.by_class) == int((manifest.index().annotations["iscrowd"] == 0).sum())
    assert data.source_digest == manifest.source_digest

"""Rules about the code itself that neither ruff nor import-linter can hold."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("detr", "jobs", "pipeline", "shards")
RIDDLES = {
    "how",
    "of",
    "that",
    "these",
    "this",
    "those",
    "what",
    "when",
    "where",
    "whether",
    "which",
    "who",
    "whose",
    "why",
}
HOMES_OF_COLLECTIVES = {"pipeline/distributed", "pipeline/checkpoint"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Every docstring with its place, and every string below a field, which is the field's help text."""
    for path in files(package):
        for node in ast.walk(ast.parse(path.read_text())):
            for child in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
                if (
                    isinstance(child, ast.Expr)
                    and isinstance(child.value, ast.Constant)
                    and isinstance(child.value.value, str)
                ):
                    yield f"{path.relative_to(ROOT)}:{child.lineno}", child.value.value


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_begin_with_a_verb_or_a_noun(package: str) -> None:
    texts = list(docstrings(package))
    riddles = [f"{where}: {text.split()[0]}" for where, text in texts if text.split()[0].lower().strip(",:") in RIDDLES]
    assert len(texts) > 20
    assert not riddles, "\n".join(riddles)


def test_collectives_stay_in_their_packages() -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in files(package)
        if "torch.distributed" in path.read_text()
    }
    strays = {path for path in users if str(Path(path).parent) not in HOMES_OF_COLLECTIVES}
    assert users
    assert not strays


def test_no_folder_is_crowded() -> None:
    folders = {path.parent for package in PACKAGES for path in files(package)}
    crowded = {
        str(folder.relative_to(ROOT)): count for folder in folders if (count := len(list(folder.glob("*.py")))) > 18
    }
    assert not crowded


def test_every_folder_is_a_package() -> None:
    """A folder without `__init__.py` is missing from the wheel."""
    folders = {path.parent for package in PACKAGES for path in files(package)}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_no_file_imports_another_in_a_circle() -> None:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    order = TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    order.prepare()  # raises CycleError, which names the circle
    assert len(graph.modules) > 100


def test_no_test_imports_another_test_or_a_conftest() -> None:
    """The helpers of several test modules are in `tests/support`, the benchmarks in `tests/bench` and `tests/gpu`."""
    imports = re.compile(r"^\s*(?:from|import) tests\.(?!support|bench|gpu)", re.MULTILINE)
    tests = list((ROOT / "tests").rglob("*.py"))
    assert len(tests) > 100
    assert not [str(path.relative_to(ROOT)) for path in tests if imports.search(path.read_text())]


def test_private_interfaces_of_ray_are_used_in_one_module() -> None:
    private = re.compile(r"ray\._private|ray\.\w+(\.v2)?\._internal|v2\._internal")
    users = [path.name for package in PACKAGES for path in files(package) if private.search(path.read_text())]
    assert users == ["ray_internals.py"]

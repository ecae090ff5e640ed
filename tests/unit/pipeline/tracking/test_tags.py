"""All tags of a run are defined in one module."""

import ast
import re
from pathlib import Path

import jobs
import pipeline
from pipeline.tracking import tags


def test_no_other_module_writes_the_name_of_a_tag() -> None:
    found = set()
    for package in (pipeline, jobs):
        for path in Path(package.__path__[0]).rglob("*.py"):
            if path == Path(tags.__file__):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and re.fullmatch(r"detr\.(?!toml)[a-z_.]+", str(node.value)):
                    found.add(node.value)
    assert found == set()


def test_tags_have_distinct_names() -> None:
    names = [value for name, value in vars(tags).items() if name.startswith("TAG_")]
    assert len(set(names)) == len(names) > 10

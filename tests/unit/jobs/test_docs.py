"""The pages about clusters: every file in them is read, and every submitted command in them becomes a job."""

import re
import shlex
from pathlib import Path

import pytest

from jobs.clusters import find_cluster
from jobs.code import Code
from jobs.commands.requests import read_request
from jobs.engines import ENGINES, engine_of
from jobs.plan import make_plan
from tests.support.in_process import ROOT

PAGES = [ROOT / "docs" / "clusters.md", *sorted((ROOT / "docs" / "clusters").glob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == kind]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_page_become_jobs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detr.toml").write_text("\n".join(blocks(page, "toml")))
    lines = [line.partition("   #")[0] for block in blocks(page, "") for line in block.splitlines()]
    submitted = [shlex.split(line) for line in lines if line.startswith("detr submit ")]
    assert submitted
    for words in submitted:
        cluster = find_cluster(words[2])
        request = read_request(cluster, words[words.index("--") + 1 :])
        plan = make_plan(
            cluster, request, Code(ROOT, "0" * 40, ("jobs/code.py",)), "0123abcd", "https://mlflow.example"
        )
        assert engine_of(cluster).render(plan)


def test_every_launcher_has_a_page() -> None:
    text = "".join(block for page in PAGES for block in blocks(page, "toml"))
    assert all(f'launcher = "{launcher}"' in text for launcher in ENGINES)

"""A registered version lists every package that serving it needs."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.registry import publish

ROOT = Path(publish.__file__).resolve().parents[2]
SERVE = """
import sys
from importlib.abc import MetaPathFinder

blocked = set(sys.argv[1:])

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Block())
import pipeline.inference.serve
"""


def installed_with(packages: Iterable[str]) -> set[str]:
    """Names of the distributions that installing `packages` brings: they and all that they require."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [Requirement(name) for name in packages]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, or provided by another distribution
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        found.add(name)
        for text in needed:
            other = Requirement(text)
            extras = {"", *requirement.extras}
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(other)
    return found


def import_serve(packages: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Import the serving code where only `packages` and what they require can be imported."""
    allowed = installed_with(packages)
    modules = importlib.metadata.packages_distributions()
    own = {"detr", "shards", "pipeline", "jobs"}
    blocked = [
        module
        for module, distributions in modules.items()
        if module not in own and not allowed & {canonicalize_name(name) for name in distributions}
    ]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVE, *blocked], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_serving_imports_only_the_packages_that_a_version_lists() -> None:
    served = import_serve(publish._PACKAGES)
    assert served.returncode == 0, served.stderr


def test_a_package_missing_from_the_list_is_noticed() -> None:
    served = import_serve(set(publish._PACKAGES) - {"safetensors"})
    assert "No module named 'safetensors" in served.stderr

"""The code of a job: what git tracks, its commit, and what stays here."""

import subprocess
from pathlib import Path

import pytest

from jobs.code import Code, code_here
from jobs.errors import JobError
from jobs.submit import _snapshot


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with two tracked files, an untracked and an ignored one."""
    root = tmp_path / "checkout"
    (root / "jobs").mkdir(parents=True)
    (root / "jobs" / "code.py").write_text("1\n")
    (root / "it's data.txt").write_text("2\n")
    (root / ".gitignore").write_text("secret.py\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    (root / "new.py").write_text("3\n")
    (root / "secret.py").write_text("4\n")
    return root


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def test_tracked_files_are_taken_as_they_are_here(checkout: Path, tmp_path: Path) -> None:
    code = code_here(checkout)
    assert code.commit == git(checkout, "rev-parse", "HEAD")
    assert set(code.files) == {"jobs/code.py", "it's data.txt", ".gitignore"}
    assert code.untracked == ("new.py",)
    before = code.digest
    (checkout / "jobs" / "code.py").write_text("changed\n")
    changed = code_here(checkout)
    assert changed.commit == f"{code.commit}-dirty"
    assert changed.digest != before
    changed.copy_to(tmp_path / "copy")
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == set(code.files)
    assert (tmp_path / "copy" / "jobs" / "code.py").read_text() == "changed\n"


def test_a_file_that_was_deleted_is_left_out(checkout: Path) -> None:
    (checkout / "it's data.txt").unlink()
    assert "it's data.txt" not in code_here(checkout).files


def test_an_installed_package_has_no_snapshot(tmp_path: Path) -> None:
    code = code_here(tmp_path)
    assert (code.commit, code.files) == ("unknown", ())
    with pytest.raises(
        JobError, match="is no git checkout of this project; expected one: submit from a checkout, or install"
    ):
        code.check()


def test_a_snapshot_with_too_many_bytes_names_the_largest_file(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.code.LIMIT_MIB", 0)
    with pytest.raises(JobError, match=r"most in .*; expected at most 0: take large files out of git"):
        code_here(checkout).check()


def test_files_that_stay_here_are_warned_of(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    made: Code = code_here(checkout)
    monkeypatch.setattr("jobs.submit.code_here", lambda: made)
    assert _snapshot(lines.append) is made
    assert lines == [
        "warning: git does not track 1 Python file, such as new.py: the snapshot leaves them here; `git add` takes them along"
    ]

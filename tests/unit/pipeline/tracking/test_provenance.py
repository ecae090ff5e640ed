"""Address of the repository, and links to its commits."""

import pytest

from pipeline.tracking.pages.links import commit_text
from pipeline.tracking.provenance import web_address

COMMIT = "f28a0d6bf2de86cb1fe0a3d2660b0572614e8997"


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/team/detr.git", "https://example.org/team/detr"),
        ("https://user:token@example.org/team/detr", "https://example.org/team/detr"),
        ("https://example.org:8443/team/detr.git", "https://example.org:8443/team/detr"),
        ("https://example.org/team/detr.git?token=x", ""),
        ("git@example.org:team/detr.git", "https://example.org/team/detr"),
        ("ssh://git@example.org:2222/team/group/detr.git/", "https://example.org/team/group/detr"),
        ("/home/user/detr.git", ""),
        ("../detr", ""),
        ("file:///home/user/detr", ""),
        ("backup:detr.git", ""),
    ],
)
def test_the_address_of_a_repository_has_no_login(remote: str, address: str) -> None:
    assert web_address(remote) == address


@pytest.mark.parametrize(
    ("commit", "repository", "text"),
    [
        (COMMIT, "", "`f28a0d6bf2de`"),
        (COMMIT, "https://example.org/x", f"[`f28a0d6bf2de`](https://example.org/x/commit/{COMMIT})"),
        (
            f"{COMMIT}-dirty",
            "https://gitlab.example.org/x",
            f"[`f28a0d6bf2de`](https://gitlab.example.org/x/-/commit/{COMMIT}) with uncommitted changes",
        ),
        ("unknown", "https://example.org/x", "`unknown`"),
    ],
)
def test_a_commit_is_a_link_where_its_repository_is_known(commit: str, repository: str, text: str) -> None:
    assert commit_text(commit, repository) == text

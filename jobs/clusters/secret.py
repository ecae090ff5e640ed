"""Secrets by reference: an entry says where a secret is, never what it is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jobs.errors import ClusterFileError, JobError

Kind = Literal["env", "file", "secret"]
FORMS = "env:VARIABLE, file:/PATH or secret:NAME/KEY"
_SENSITIVE = re.compile(
    r"passw|passphrase|pwd|secret|token|api_?key|access_?key|private_?key|credential", re.IGNORECASE
)
_PUBLIC = ("PWD", "OLDPWD", "GOOGLE_APPLICATION_CREDENTIALS", "TOKENIZERS_PARALLELISM")  # folders, a file, a switch
"""Variables that look like secrets by their names and are none."""


@dataclass(frozen=True)
class Secret:
    """A reference to a secret.

    env: a variable of the environment. file: a file. secret: a key of a Kubernetes Secret.
    """

    kind: Kind
    where: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}{'/' + self.key if self.key else ''}"

    def value(self) -> str:
        """Return the secret itself, from this machine; raise `JobError` where it is not here."""
        if self.kind == "env":
            found = os.environ.get(self.where, "")
        elif self.kind == "file":
            try:
                found = Path(self.where).expanduser().read_text().strip()
            except OSError as error:
                raise JobError(f"{self} cannot be read ({error.strerror}); expected the file on this machine") from None
        else:
            raise JobError(f"{self} is a Secret of Kubernetes; expected env:VARIABLE or file:/PATH for this machine")
        if not found:
            raise JobError(f"{self} is empty; expected the secret there, on this machine")
        return found


def parse_secret(text: str, field: str) -> Secret:
    """Return the reference that `text` of this field is; the error never repeats the text, which may be the secret."""
    kind, colon, where = text.partition(":")
    if not colon or kind not in get_args(Kind) or not where:
        raise ClusterFileError(f"{field} is not a reference to a secret; expected {FORMS}, never the secret itself")
    if kind == "env" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", where):
        raise ClusterFileError(
            f"{field} names no variable; expected env:VARIABLE, such as env:MLFLOW_TRACKING_PASSWORD"
        )
    if kind == "secret":
        name, slash, key = where.partition("/")
        if not (
            slash and re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name) and re.fullmatch(r"[-._A-Za-z0-9]+", key)
        ):
            raise ClusterFileError(
                f"{field} names no key of a Secret; expected secret:NAME/KEY, such as secret:mlflow/password"
            )
        return Secret("secret", name, key)
    return Secret(kind, where)  # type: ignore[arg-type]


def is_sensitive(name: str) -> bool:
    """Return True if a variable of this name is likely to hold a secret."""
    return bool(_SENSITIVE.search(name)) and name not in _PUBLIC and not name.endswith(("_PATH", "_FILE", "_MODE"))

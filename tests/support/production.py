"""An MLflow server like those of production: PostgreSQL, artifacts on an S3 server, and users with passwords."""

import base64
import json
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.mlflow_server import MlflowServer
from tests.support.postgres import PASSWORD as DATABASE_PASSWORD
from tests.support.postgres import Postgres
from tests.support.s3_server import SECRET, S3Server

USER, PASSWORD = "trainer", "planted-password-of-the-trainer"
_ADMIN_PASSWORD = "planted-password-of-the-admin"
SECRETS = (PASSWORD, _ADMIN_PASSWORD, DATABASE_PASSWORD, SECRET)
"""Every password of the servers; base64 of those that travel as a login is found by `encoded`."""


@dataclass(frozen=True)
class Production:
    """The server, and the stores of its artifacts and of everything else."""

    server: MlflowServer
    store: S3Server
    database: Postgres

    @property
    def login(self) -> dict[str, str]:
        """Variables of a process that uses the server."""
        return {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}

    @property
    def uri_with_login(self) -> str:
        """Address of the server with user and password in it."""
        return self.server.url.replace("://", f"://{USER}:{PASSWORD}@")

    @property
    def objects(self) -> list[Path]:
        """Files of the artifacts in the S3 server."""
        return [path for path in (self.store.root / "mlflow").rglob("*") if path.is_file()]


def encoded(user: str = USER, password: str = PASSWORD) -> str:
    """Return a login as it travels in the header of a request."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@contextmanager
def production(folder: Path) -> Iterator[Production]:
    """Yield the server, on which `USER` may make experiments and models of their own; it ends with the block."""
    with ExitStack() as stack:
        (folder / "s3").mkdir()
        store = S3Server(folder / "s3", written=True)
        stack.callback(store.stop)
        (store.root / "mlflow").mkdir()
        database = Postgres()
        stack.callback(database.close)
        settings = folder / "auth.ini"
        settings.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{folder / 'users.db'}\n"
            f"admin_username = admin\nadmin_password = {_ADMIN_PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 3600\n"  # without it every request costs 0.1 s for the hash of a password
        )
        environment = {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-key-of-these-tests",
            "MLFLOW_S3_ENDPOINT_URL": store.environment["AWS_ENDPOINT_URL_S3"],
            "AWS_DEFAULT_REGION": "us-east-1",
            **store.environment,
        }
        flags = ["--app-name", "basic-auth", "--artifacts-destination", "s3://mlflow"]
        server = MlflowServer(folder, database.uri, *flags, environment=environment)
        stack.callback(server.stop)
        _create_user(server.url)
        yield Production(server, store, database)


def _create_user(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/users/create",
        data=json.dumps({"username": USER, "password": PASSWORD}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Basic {encoded('admin', _ADMIN_PASSWORD)}",
        },
    )
    urllib.request.urlopen(request, timeout=120).close()

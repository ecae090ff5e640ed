"""MLflow UI of the local store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from pipeline.errors import TrackingError
from pipeline.tracking.mlflow_client import connect, tracking_uri, without_secret
from pipeline.tracking.mlflow_runs import find_runs
from pipeline.tracking.pages.links import experiments_page, is_served, run_page, runs_page, ui_address


def serve_ui(host: str, port: int) -> None:
    """Serve the UI until interrupted; if the store is a server already, only print its address."""
    uri = tracking_uri()
    if is_served():
        print(f"the tracking server has a UI: {ui_address()}{experiments_page()}")
        return
    newest = find_runs(connect(uri), limit=1)
    with socket.socket() as probe:
        if probe.connect_ex((host, port)) == 0:
            raise TrackingError(f"{host}:{port} is in use; expected a free port: give --port N")
    address = f"http://{host}:{port}/"
    print(f"MLflow UI: {address}{experiments_page()}  (Ctrl-C ends it)")
    for run in newest:
        print(f"all runs:  {address}{runs_page(run.info.experiment_id)}")
        print(f"newest:    {address}{run_page(run.info.experiment_id, run.info.run_id)}")
    sys.stdout.flush()
    hosts = f"{host},{host}:{port},localhost,localhost:{port}"
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument, which every user of the machine can read
    }
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    command += ["--allowed-hosts", hosts]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        status = server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return
    raise TrackingError(
        f"the MLflow server ended with status {status}; `mlflow server --backend-store-uri {without_secret(uri)}` says why"
    )

"""Many kills of one run, each followed by the same command: `python -m tests.bench.kills --kills 20 --seed 7`.

The seed fixes what is killed, at which steps, and which commands come from another host. The exit status is 1 if the run
is not, bit for bit, the undisturbed one. `--s3` keeps the run in an S3 server of this machine instead of a folder.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from shards.config import WriteConfig
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco
from tests.support.kills import KilledRun, plan
from tests.support.s3_server import S3Server


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 100_000, help="a new one by default")
    parser.add_argument("--s3", action="store_true", help="keep the run in an S3 server instead of a folder")
    parser.add_argument("--folder", type=Path, help="new folder that keeps the run, its hosts and their logs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing of the cluster stays
    print(f"--kills {options.kills} --seed {options.seed}{' --s3' if options.s3 else ''}", flush=True)
    server = None
    with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as name:
        folder = options.folder or Path(name)
        make_data(folder / "data")
        storage, environment = str(folder / "runs"), {}
        if options.s3:
            server = S3Server(folder, written=True)
            storage, environment = "s3://sets/runs", server.environment
            os.environ.update(environment)
        try:
            run = KilledRun(
                folder, folder / "data", storage, options.kills, environment, lambda t: print(t, flush=True)
            )
            report = run.survive(plan(options.seed, options.kills))
        finally:
            if server:
                server.stop()
    print(f"seed {options.seed}: {report}")
    return 1 if report.problems else 0


def make_data(folder: Path) -> None:
    """Write 24 images for training and 6 for validation as shards below `folder`."""
    made = write_synthetic(folder / "coco", train=24, val=6, size=64)
    for name, split in (("train", made.train), ("val", made.val)):
        write_coco(split.images, split.annotations, folder / name, WriteConfig(samples_per_shard=5))
    shutil.rmtree(folder / "coco", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

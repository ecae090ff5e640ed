"""Entries of clusters as a user would write them, one for each launcher and more."""

FIXED, ELASTIC = (
    "{count = 8, gpus = 8, cpus = 64, memory_gib = 500, accelerator = 'H100'}",
    "{min = 1, max = 8, gpus = 8, cpus = 64, memory_gib = 500, accelerator = 'H100', spot = true}",
)
_COMMON = """
storage = "s3://bucket/runs"
mlflow = "https://mlflow.example"
cache = "/local/cache"
environment = {NCCL_DEBUG = "WARN", NOTE = "it's a $test"}
on_cluster = ["s3://bucket", "https://mlflow.example"]
"""
ENTRIES = {
    "ray": _COMMON
    + """
address = "https://head:8265"
token = "file:~/.ray/lab"
secrets = {AWS_SECRET_ACCESS_KEY = "env:AWS_SECRET_ACCESS_KEY"}
""",
    "kuberay": _COMMON
    + """
image = "registry/detr@sha256:0123"
time_limit = "2d12h"
volumes = {coco = "/coco"}
secrets = {AWS_SECRET_ACCESS_KEY = "secret:aws/key", MLFLOW_TRACKING_PASSWORD = "secret:mlflow/password"}
token_secret = "ray-token"
tolerations = ["nvidia.com/gpu"]
service_account = "trainer"
image_pull_secret = "registry"
""",
    "slurm": _COMMON
    + """
partition = "gpu"
time_limit = "2d12h"
account = "vision"
qos = "high"
setup = ["module load python/3.12", "source /shared/venv/bin/activate"]
options = ["--constraint=ib"]
secrets = {AWS_SECRET_ACCESS_KEY = "file:~/.secrets/aws key", MLFLOW_TRACKING_PASSWORD = "env:MLFLOW_LOGIN"}
""",
    "sky": _COMMON
    + """
infra = "k8s/lab"
image = "docker:registry/detr@sha256:0123"
priority = "high"
mounts = {"/coco" = "s3://bucket/coco"}
secrets = {AWS_SECRET_ACCESS_KEY = "env:AWS_SECRET_ACCESS_KEY"}
""",
    "ray_up": _COMMON
    + """
provider = "aws"
region = "us-east-1"
instance = "p5.48xlarge"
head = {instance = "m6i.xlarge"}
secrets = {AWS_SECRET_ACCESS_KEY = "file:/etc/detr/aws"}
""",
}


def entry(launcher: str, nodes: str = FIXED) -> str:
    """Return the text of a file with the entry `it`."""
    return f'[clusters.it]\nlauncher = "{launcher}"\nnodes = {nodes}\n{ENTRIES[launcher]}'

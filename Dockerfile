# Image of this release for KubeRay, SkyPilot and other launchers: `docker build -t registry/detr .`
# The libraries are those of requirements.lock, CUDA's included; the nodes need only NVIDIA's driver.
FROM python:3.11-slim-bookworm AS build

ARG UV_VERSION=0.12.24
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
WORKDIR /opt/detr
COPY requirements.lock ./
RUN uv venv /opt/venv \
    && uv pip install --no-cache --python /opt/venv/bin/python --compile-bytecode --requirements requirements.lock
COPY pyproject.toml README.md ./
COPY detr ./detr
COPY jobs ./jobs
COPY pipeline ./pipeline
COPY shards ./shards
RUN uv pip install --no-cache --python /opt/venv/bin/python --no-deps .

FROM python:3.11-slim-bookworm

# The commit of the code, which every run records: `docker build --build-arg COMMIT=$(git rev-parse HEAD) ...`
ARG COMMIT=unknown
ENV DETR_COMMIT=${COMMIT} PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 1000 detr
USER 1000
WORKDIR /home/detr
RUN detr --help

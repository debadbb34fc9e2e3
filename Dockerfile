# qdist and everything it needs to run, for the command line and for every node of a Ray cluster.
# How to use it, and how its steps are proven without Docker: docs/docker.md. Needs BuildKit.

# Freeze the base with --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheels
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The locks first: these layers are rebuilt only when a lock changes.
COPY requirements-build.lock requirements.lock ./
RUN python -m pip install --require-hashes -r requirements-build.lock
RUN python -m pip wheel --require-hashes --no-build-isolation -r requirements.lock -w /wheels/lock
COPY pyproject.toml README.md ./
COPY qdist qdist
COPY actors actors
COPY conf conf
RUN python -m pip wheel --no-deps --no-build-isolation -w /wheels/qdist .

FROM ${PYTHON_IMAGE}
RUN useradd --create-home --uid 1000 --shell /bin/bash qdist \
    && install -d -o qdist -g qdist /work \
    && install -d -m 1777 /var/cache/numba
# From verified wheels alone: no index, no compiler, no source tree in the image.
RUN --mount=type=bind,from=wheels,source=/wheels/lock,target=/wheels \
    python -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl
RUN --mount=type=bind,from=wheels,source=/wheels/qdist,target=/wheels \
    python -m pip install --no-cache-dir --no-index --no-deps /wheels/*.whl

# The Numba cache lies where any user may write, for `docker run --user`. MLflow asks for git at
# import and need not complain that there is none.
ENV PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/var/cache/numba \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet
USER qdist
WORKDIR /work
ENTRYPOINT ["qdist"]
CMD ["--help"]

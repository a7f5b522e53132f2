# The workers and the command line: `docker build -t viewer-personas .`
# The packages of the local stack are left out: Kafka, Cassandra and Triton are services of their own here.

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/personas
WORKDIR /build
COPY requirements/build.lock requirements/worker.lock ./
RUN /opt/personas/bin/pip install --require-hashes --only-binary=:all: -r build.lock -r worker.lock
COPY pyproject.toml README.md LICENSE ./
COPY streams streams
COPY agents agents
COPY triton_models triton_models
# The build tool is the locked one, installed above: nothing is fetched here.
RUN /opt/personas/bin/pip install --no-deps --no-build-isolation . \
    && /opt/personas/bin/pip check

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin personas
COPY --from=build /opt/personas /opt/personas
ENV PATH=/opt/personas/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["personas"]
CMD ["--help"]

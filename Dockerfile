# The proxy alone: PostgreSQL and LiteLLM are other containers (`tallygate serve` insists on them).
#
#   docker build --tag tallygate .
#   docker run --env TALLYGATE_DATABASE_URL=… --env TALLYGATE_LITELLM_URL=… \
#       --env TALLYGATE_LITELLM_KEY=… --env TALLYGATE_ADMIN_KEY=… \
#       --publish 4000:4000 --volume tallygate:/var/lib/tallygate tallygate

# Any Debian-like image with python3 (3.11 or later) and its venv module will do.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /venv && python3 -m venv /builder
COPY requirements-proxy.lock ./
RUN /venv/bin/pip install --no-deps --no-compile --require-hashes \
        --requirement requirements-proxy.lock
# The build backend comes from the lock too; it stays in this stage.
COPY requirements.lock ./
RUN awk '/^[^ ]/ {on = /^(hatchling|packaging|pathspec|pluggy|trove-classifiers)==/} on' \
        requirements.lock > build.lock \
    && /builder/bin/pip install --no-deps --require-hashes --requirement build.lock
COPY pyproject.toml README.md schema.sql config.yaml ./
COPY pricing pricing
COPY proxy proxy
RUN /builder/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /venv/bin/pip install --no-deps --no-compile /wheels/*.whl \
    && /venv/bin/pip uninstall --yes pip setuptools \
    # Bytecode of what is used, and of nothing else: the rest would be a fifth of the image.
    && PROMETHEUS_MULTIPROC_DIR=/tmp /venv/bin/python -c \
        "import proxy.cli, proxy.serving, proxy.app, uvloop, httptools"

FROM ${BASE}
RUN useradd --uid 10001 --shell /usr/sbin/nologin --home-dir /var/lib/tallygate tallygate \
    && install --directory --owner tallygate --group tallygate --mode 0700 /var/lib/tallygate
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TALLYGATE_HOST=0.0.0.0 \
    TALLYGATE_DATA_DIR=/var/lib/tallygate
USER 10001
WORKDIR /var/lib/tallygate
# The spool: settlements that PostgreSQL was not there to take.
VOLUME /var/lib/tallygate
EXPOSE 4000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('TALLYGATE_PORT', '4000') + '/livez', timeout=2)"]
ENTRYPOINT ["tallygate"]
CMD ["serve"]

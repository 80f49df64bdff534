# Two stages: the first builds the wheel and an environment, the second carries only that environment.
#   docker build -t qerve .                                    PyTorch from the default index
#   docker build -t qerve --build-arg TORCH_INDEX=<URL> .      from an index of CPU-only wheels: a much smaller image
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#       -p 127.0.0.1:8000:8000 -v ./artifacts/NAME:/artifacts/model:ro qerve

FROM python:3.11.14-slim-bookworm AS build

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# What compiles the native kernels; their library needs nothing but the C library, so none of this is carried along.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv --without-pip /opt/qerve
WORKDIR /src

# The dependencies are a layer of their own: a change of the source does not download PyTorch again.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip --python /opt/qerve/bin/python install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.txt

COPY README.md CMakeLists.txt ./
COPY models/ models/
COPY service/ service/
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip --python /opt/qerve/bin/python install --no-deps /wheels/*.whl


FROM python:3.11.14-slim-bookworm

# Nothing is written outside /tmp, and nothing is looked up on a model hub.
ENV PATH=/opt/qerve/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    QERVE_HOST=0.0.0.0 \
    QERVE_PORT=8000

RUN groupadd --system --gid 10001 qerve \
    && useradd --system --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin qerve \
    && mkdir /artifacts

COPY --from=build /opt/qerve /opt/qerve

USER 10001:10001
WORKDIR /tmp
EXPOSE 8000

# The readiness probe fails while the model loads and while the server drains.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['QERVE_PORT'] + '/health/ready', timeout=4)"]

ENTRYPOINT ["qerve", "serve"]
CMD ["/artifacts/model"]

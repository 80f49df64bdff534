# Two images from one file:
#   docker build -t qerve .                        for processors: PyTorch's CPU wheels; under 1.2 GB
#   docker build -t qerve-cuda --target cuda .     for NVIDIA GPUs: PyTorch's CUDA wheels and Triton; under 9 GB
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#       -p 127.0.0.1:8000:8000 -v ./artifacts/NAME:/artifacts/model:ro qerve           (for CUDA: --gpus 1, qerve-cuda)
# TORCH_INDEX names another package index for PyTorch. What is compiled and fetched stays in the first stages.

# Pinned to a full version. A digest would be firmer: append @sha256:... of the image that you have checked.
FROM python:3.11.14-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PATH=/opt/qerve/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1


# The wheel, with the native kernels; their library needs nothing but the C library, so no compiler is carried along.
FROM base AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md CMakeLists.txt ./
COPY models/ models/
COPY service/ service/
RUN pip wheel --no-deps --wheel-dir /wheels .


# The dependencies are a layer of their own: a change of the source does not download PyTorch again.
FROM base AS requirements
WORKDIR /src
COPY pyproject.toml ./
RUN python -m venv --without-pip /opt/qerve \
    && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], sep='\n', file=open('cpu.txt', 'w')); print(*p['dependencies'], *p['optional-dependencies']['gpu'], sep='\n', file=open('cuda.txt', 'w'))"

FROM requirements AS environment-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/qerve/bin/python install --extra-index-url "$TORCH_INDEX" -r cpu.txt
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/qerve/bin/python install --no-deps /wheels/*.whl

FROM requirements AS environment-cuda
ARG TORCH_INDEX=""
RUN pip --python /opt/qerve/bin/python install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r cuda.txt
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/qerve/bin/python install --no-deps /wheels/*.whl


# What both images are: nothing is written outside /tmp, and nothing is looked up on a model hub.
FROM base AS runtime
ENV HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    QERVE_HOST=0.0.0.0 \
    QERVE_PORT=8000
RUN groupadd --system --gid 10001 qerve \
    && useradd --system --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin qerve \
    && mkdir /artifacts
WORKDIR /tmp
EXPOSE 8000
# The readiness probe fails while the model loads and while the server drains.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['QERVE_PORT'] + '/health/ready', timeout=4)"]
# Without a shell in between, so that SIGTERM arrives and requests may finish.
ENTRYPOINT ["qerve", "serve"]
CMD ["/artifacts/model"]


FROM runtime AS cuda
# Triton compiles what launches its kernels when they first run, into /tmp.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/tmp/triton
COPY --from=environment-cuda /opt/qerve /opt/qerve
USER 10001:10001


# The default: the last stage.
FROM runtime AS cpu
COPY --from=environment-cpu /opt/qerve /opt/qerve
USER 10001:10001

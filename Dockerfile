# A container with the command sft and with DVC, Prefect and MLflow, for projects of `sft init`.
#
#   docker build --tag sft .                                                        # CPU
#   docker build --tag sft:cuda --build-arg BASE=nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04 \
#                --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   # NVIDIA GPUs
#   docker run --rm -it --user "$(id -u):$(id -g)" --volume "$PWD:/project" sft repro    # in a project of `sft init`
#   docker run --rm -it --user "$(id -u):$(id -g)" --volume "$PWD:/project" --gpus all --shm-size 8g sft:cuda repro
#
# BASE is an image of Debian or Ubuntu. TORCH_INDEX is the index of the builds of torch that fit the base.
ARG BASE=ubuntu:24.04
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG UV_VERSION=0.13.9
ARG PYTHON_VERSION=3.12

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# build-essential: kernels that Triton compiles at run time
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates curl git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir "uv==${UV_VERSION}"

ENV PATH=/opt/sft/bin:/opt/uv/bin:$PATH \
    UV_PYTHON_INSTALL_DIR=/opt/python \
    DVC_NO_ANALYTICS=1 \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HOME=/cache \
    SFT_CACHE=/cache/sft \
    HF_HOME=/cache/huggingface

# The locked versions first: they change less often than the code, so that this layer is cached.
WORKDIR /opt/src
COPY requirements.lock requirements.hashes ./
RUN uv venv --python "${PYTHON_VERSION}" /opt/sft \
    && uv pip install --python /opt/sft/bin/python --no-cache --index "${TORCH_INDEX}" \
       --index-strategy unsafe-best-match --constraints requirements.hashes --requirements requirements.lock

# Without .git (.dockerignore), the version is given here: docker build --build-arg VERSION=$(git describe --tags)
ARG VERSION=0.1.0
COPY . .
RUN SETUPTOOLS_SCM_PRETEND_VERSION="${VERSION#v}" uv pip install --python /opt/sft/bin/python --no-cache --no-deps . \
    && useradd --create-home --uid 10001 sft \
    && mkdir -p /project /cache \
    && chmod 1777 /project /cache \
    && git config --system --add safe.directory '*'

USER 10001
WORKDIR /project
VOLUME /cache
ENTRYPOINT ["sft"]
CMD ["--help"]

# Images for serving and training. Not built by CI: it has no container engine.
#
#   docker build --target serve -t lumrec-serve .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs:/runs:ro" -v lumrec-state:/state \
#     -e LUMREC_TOKEN lumrec-serve --bundle /runs/my-log-rank-bundle --store /runs/my-log-query \
#     --state /state/my-log serve.host=0.0.0.0
#
#   docker build --target train -t lumrec-train .                          # CPU
#   docker build --target train --build-arg DEVICE=cuda -t lumrec-train .  # CUDA 13, needs the NVIDIA container toolkit
#   docker run --rm --shm-size 4g -v "$PWD:/work" lumrec-train pipeline --config my-log.yaml
FROM python:3.11-slim AS base
ARG DEVICE=cpu
# Empty: pip's usual index. The CPU build of torch comes from the index that pytorch.org/get-started names for "CPU".
ARG TORCH_INDEX=
# A C++ compiler: torch.compile and AOTInductor.
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /lumrec
COPY pyproject.toml README.md LICENSE Makefile ./
COPY requirements requirements
COPY lumrec lumrec
COPY modules modules
COPY apps apps
COPY configs configs
RUN make setup DEVICE=${DEVICE} TORCH_INDEX=${TORCH_INDEX} && rm -rf /root/.cache
ENV PATH=/lumrec/.venv/bin:$PATH PYTHONUNBUFFERED=1

FROM base AS train
WORKDIR /work
ENTRYPOINT ["lumrec"]

FROM base AS serve
RUN useradd --create-home lumrec
USER lumrec
WORKDIR /home/lumrec
EXPOSE 8000
# A container's loopback cannot be reached from outside: serve.host=0.0.0.0 listens on all addresses and needs a token
# (LUMREC_TOKEN).
ENTRYPOINT ["lumrec", "serve"]

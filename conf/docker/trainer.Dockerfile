# The image of a trainer node: torch and the trainer; no Spark and no Java.
#
#   pip wheel --no-deps -w dist . && docker build -f conf/docker/trainer.Dockerfile -t miniplm-trainer:0.1.0 .
#   docker run --gpus all -v /data:/data miniplm-trainer:0.1.0 train -c /data/experiment.yaml
#
# With several GPUs: docker run --entrypoint torchrun ... --standalone --nproc-per-node 8 -m trainer train -c ...
FROM python:3.11-slim-bookworm

# Triton compiles with a C compiler what torch.compile makes. The newest fixes of Debian are wanted, so no versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

ENV MINIPLM_CACHE=/opt/miniplm/cache
RUN useradd --uid 1000 --gid 0 --create-home --home-dir /opt/miniplm miniplm \
    && mkdir -p "$MINIPLM_CACHE" \
    && chown 1000:0 "$MINIPLM_CACHE"

ARG EXTRAS=train,s3
COPY constraints.txt dist/miniplm-*.whl /tmp/wheel/
RUN python -m venv /opt/miniplm \
    && /opt/miniplm/bin/pip install --no-cache-dir -c /tmp/wheel/constraints.txt \
       "$(echo /tmp/wheel/miniplm-*.whl)[${EXTRAS}]"
ENV PATH=/opt/miniplm/bin:$PATH

USER 1000
WORKDIR /opt/miniplm
ENTRYPOINT ["tini", "--", "python", "-m", "trainer"]
CMD ["--help"]

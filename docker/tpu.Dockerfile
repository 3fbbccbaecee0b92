# An image for TPU VMs. Build in the repository:  docker build -f docker/tpu.Dockerfile -t qwen2audio:tpu .
# Run, with a read-only root; if doctor finds no chips, they may belong to root: --user 0
#   docker run --rm --privileged --net host --read-only --tmpfs /tmp -v qwen2audio-cache:/cache qwen2audio:tpu \
#     generate --audio example:digits-4719 "Which digits are spoken?"
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY configs configs
COPY convert convert
COPY qwen2audio_jax qwen2audio_jax
RUN python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir '.[tpu,hub,buckets,serve]'

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 10001 listener && install -d -o listener /cache
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    JAX_PLATFORMS=tpu,cpu \
    QWEN2AUDIO_CACHE=/cache \
    HF_HOME=/cache/huggingface
USER 10001
VOLUME /cache
ENTRYPOINT ["qwen2audio"]
CMD ["doctor"]

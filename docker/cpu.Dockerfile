# A CPU image. Build in the repository:  docker build -f docker/cpu.Dockerfile -t qwen2audio:cpu .
# Run, with a read-only root and as an ordinary user:
#   docker run --rm --read-only --tmpfs /tmp -v qwen2audio-cache:/cache qwen2audio:cpu \
#     generate --audio example:digits-4719 "Which digits are spoken?"
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE MANIFEST.in ./
COPY configs configs
COPY convert convert
COPY qwen2audio_jax qwen2audio_jax
RUN python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir '.[hub,buckets,serve]'

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --create-home --uid 10001 listener && install -d -o listener /cache
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    JAX_PLATFORMS=cpu \
    QWEN2AUDIO_CACHE=/cache \
    QWEN2AUDIO_COMPILATION_CACHE=/cache/compiled \
    HF_HOME=/cache/huggingface
USER 10001
VOLUME /cache
ENTRYPOINT ["qwen2audio"]
CMD ["doctor"]

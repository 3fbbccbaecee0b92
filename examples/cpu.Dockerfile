# The server on a CPU, as a user without rights. From the repository's top:
#
#     docker build -f examples/cpu.Dockerfile -t qwen2audio-jax:cpu .
#     docker run --rm -p 127.0.0.1:8000:8000 qwen2audio-jax:cpu serve --host 0.0.0.0 --no-auth

FROM python:3.12-slim

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY convert convert
COPY qwen2audio_jax qwen2audio_jax
RUN pip install --no-cache-dir '.[serve,hub]' && rm -rf /source/*

RUN useradd --create-home user && install -d -o user /cache
USER user
WORKDIR /home/user
ENV QWEN2AUDIO_CACHE=/cache QWEN2AUDIO_COMPILATION_CACHE=/cache/compiled JAX_PLATFORMS=cpu PYTHONDONTWRITEBYTECODE=1
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["qwen2audio"]

#!/bin/sh
# Collects what benchmarks/gpu.py installs on a machine without a network: the wheels of this package for CUDA and of
# torch and transformers, with all that they need, for this machine's Python and processor. Some 8 GB.
#
#     sh benchmarks/gpu_wheels.sh wheels [PYTHON]
#
# Then take the checkout and the folder to the GPU: python benchmarks/gpu.py setup --wheels wheels --venvs venvs
set -eu
wheels=${1:?usage: gpu_wheels.sh FOLDER [PYTHON]}
python=${2:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$wheels"
"$python" -m pip wheel --no-deps --wheel-dir "$wheels" "$here"
# Apart, as the two need other releases of CUDA's libraries.
"$python" -m pip download --only-binary :all: --dest "$wheels" --find-links "$wheels" "qwen2audio-jax[cuda]"
"$python" -m pip download --only-binary :all: --dest "$wheels" torch "transformers>=5.10"

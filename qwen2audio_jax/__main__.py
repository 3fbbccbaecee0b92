"""`python -m qwen2audio_jax`: the command `qwen2audio` where it is not on the path."""

import sys

from qwen2audio_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

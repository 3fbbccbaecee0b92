"""A Ray Data pipeline that answers about clips, one model on every TPU host of four chips.

    ray job submit --working-dir . -- python examples/ray_tpu.py gs://mine/clips.parquet gs://mine/answers

Without a pipeline around it `qwen2audio batch --ray` is simpler, and goes on where it was stopped.
"""

import sys

import ray

from qwen2audio_jax.batch import Answerer
from qwen2audio_jax.ray import answer


def main(source: str, target: str, *, model: str = "gs://mine/instruct", hosts: int = 4, chips: int = 4) -> None:
    """Read Parquet with columns `id` and `audio`, and write it with `text`, `finish_reason` and `error`."""
    resources = {"TPU": chips} if chips else None
    mesh = {"data": 1, "model": chips} if chips else None
    answerer = Answerer(model, options={"max_new_tokens": 64}, mesh=mesh)
    dataset = answer(
        ray.data.read_parquet(source),
        answerer=answerer,
        prompt="What is said?",
        id="id",
        actors=hosts,
        resources=resources,
    )
    dataset.drop_columns(["audio"]).write_parquet(target)


if __name__ == "__main__":
    main(*sys.argv[1:3])

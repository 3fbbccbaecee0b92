"""Batch jobs: minimum chip-hours for one answer to each of a number of clips."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen2audio_jax.plan.inference import Plan
from qwen2audio_jax.plan.request import FRAMES_A_SECOND, audio_tokens, shapes_of
from qwen2audio_jax.plan.roofline import bound_of
from qwen2audio_jax.plan.topology import abstract_mesh
from qwen2audio_jax.plan.work import work_of

REACHED = 0.5
"""Share of the roofline that is reached; published servers of models of this shape range from 0.29 (sglang-jax, Qwen-7B
on v6e) over 0.68 (gpt-fast, Llama-2-7B on A100) to 0.85 (jax-llm-examples, 70B on v5e)."""


@dataclass(frozen=True)
class Job:
    """Clips to answer one question about each.

    Attributes:
        clips: number of clips.
        mean_seconds: mean length of a clip.
    """

    clips: int
    mean_seconds: float


def make_job(clips: int, mean_seconds: float, *, longest: float) -> Job:
    """Make a job.

    Raises:
        ValueError: no clips, or clips too long for a prompt of the plan.
    """
    if clips < 1:
        raise ValueError(f"--clips {clips}: at least 1")
    if not 0.03 <= mean_seconds <= longest:
        raise ValueError(
            f"--mean-seconds {mean_seconds:g}: a clip lasts from 0.03 s to the {longest:g} s that --prompt-tokens has "
            "room for; longer sounds are cut into several clips"
        )
    return Job(clips, mean_seconds)


def hours_of(job: Job, plan: Plan) -> dict[str, Any]:
    """Chip-hours of a job in batches of the plan's size: at the roofline, and at `REACHED` of it.

    Prompts have the text of the plan's and the audio tokens of the mean clip; the decode step is the plan's.
    """
    request = plan.request
    text = request.prompt_tokens - request.clip_tokens
    shorter = replace(request, prompt_tokens=text + max(audio_tokens(job.mean_seconds), 1))
    mesh = abstract_mesh(request.data, request.model)
    shapes = shapes_of(shorter, rows=request.batch, mesh=mesh, frames=round(job.mean_seconds * FRAMES_A_SECOND))
    chip, total = request.topology.chip, 0.0
    for stage, measured in plan.stages.items():
        of = plan.shapes if stage == "decode" else shapes
        stored = {"cache_dtype": request.cache, "weights": request.stored}
        work = work_of(stage, request.config, of, mesh=mesh, **stored)
        # A prefill's communication grows with its tokens.
        share = shapes.tokens / plan.shapes.tokens if stage == "prefill" else 1.0
        bound = bound_of(work, measured.exchanges, chip=chip)
        seconds = max(bound.compute, bound.memory) + bound.communication * share
        total += seconds * (request.max_new_tokens - 1 if stage == "decode" else 1)
    batches = -(-job.clips // request.batch)
    hours = total * batches * request.topology.chips / 3600
    return {
        **asdict(job),
        "prompt_tokens": shorter.prompt_tokens,
        "batches": batches,
        "seconds_a_batch_at_least": total,
        "chip_hours_at_least": hours,
        "reached_share_of_roofline": REACHED,
        "chip_hours": hours / REACHED,
    }

"""Batch jobs: minimum chip-hours for one answer to each of a number of clips, and how fast speech is transcribed."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen2audio_jax.plan.inference import Plan
from qwen2audio_jax.plan.request import FRAMES_A_SECOND, TEXT_TOKENS, Shapes, audio_tokens, shapes_of
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


def batch_seconds(plan: Plan, shapes: Shapes, *, new_tokens: int) -> float:
    """Least seconds of one batch of other shapes on the plan's machine, with the exchanges of the plan's programs."""
    request, total = plan.request, 0.0
    mesh = abstract_mesh(request.data, request.model)
    for stage, measured in plan.stages.items():
        work = work_of(stage, request.config, shapes, mesh=mesh, cache_dtype=request.cache, weights=request.stored)
        # A prefill's communication grows with its tokens.
        share = shapes.tokens / plan.shapes.tokens if stage == "prefill" else 1.0
        bound = bound_of(work, measured.exchanges, chip=request.topology.chip)
        seconds = max(bound.compute, bound.memory) + bound.communication * share
        total += seconds * (new_tokens - 1 if stage == "decode" else 1)
    return total


def hours_of(job: Job, plan: Plan) -> dict[str, Any]:
    """Chip-hours of a job in batches of the plan's size: at the roofline, and at `REACHED` of it.

    Prompts have the text of the plan's and the audio tokens of the mean clip; the decode step is the plan's.
    """
    request = plan.request
    text = request.prompt_tokens - request.clip_tokens
    shorter = replace(request, prompt_tokens=text + max(audio_tokens(job.mean_seconds), 1))
    mesh = abstract_mesh(request.data, request.model)
    shapes = shapes_of(shorter, rows=request.batch, mesh=mesh, frames=round(job.mean_seconds * FRAMES_A_SECOND))
    shapes = replace(shapes, capacity=plan.shapes.capacity)
    total = batch_seconds(plan, shapes, new_tokens=request.max_new_tokens)
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


TRANSCRIBED_SECONDS, TRANSCRIPT_TOKENS = 20.0, 80
"""Seconds of a clip of speech, and the tokens of what is said in it: 2 to 3 words a second."""


def transcription(plan: Plan) -> dict[str, Any] | None:
    """Seconds of speech that the machine transcribes in a second: at the roofline, and at `REACHED` of it.

    The batch has the plan's rows. None if that does not fit, has no clips, or has a cache too small for a transcript.
    """
    seconds, vectors = TRANSCRIBED_SECONDS, audio_tokens(TRANSCRIBED_SECONDS)
    prompt, config = TEXT_TOKENS + vectors, plan.request.config
    request = replace(plan.request, prompt_tokens=prompt, max_new_tokens=TRANSCRIPT_TOKENS)
    if vectors > config.audio_config.max_tokens or prompt > config.text_config.max_position_embeddings:
        return None
    mesh = abstract_mesh(request.data, request.model)
    shapes = shapes_of(request, rows=request.batch, mesh=mesh, frames=round(seconds * FRAMES_A_SECOND))
    if not plan.fits or not plan.shapes.clips or plan.shapes.capacity < shapes.capacity:
        return None
    rate = request.batch * seconds / batch_seconds(plan, shapes, new_tokens=TRANSCRIPT_TOKENS)
    return {
        "clip_seconds": seconds,
        "prompt_tokens": prompt,
        "new_tokens": TRANSCRIPT_TOKENS,
        "times_real_time_at_most": rate,
        "reached_share_of_roofline": REACHED,
        "times_real_time": rate * REACHED,
    }

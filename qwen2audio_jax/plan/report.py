"""Report of a plan as plain values: the content of `qwen2audio plan --json`."""

from dataclasses import asdict
from typing import Any

from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.plan import arithmetic
from qwen2audio_jax.plan.inference import Plan
from qwen2audio_jax.plan.job import Job, hours_of, transcription
from qwen2audio_jax.plan.program import summary
from qwen2audio_jax.plan.request import clip_seconds
from qwen2audio_jax.plan.roofline import ASSUMPTIONS, Bound, bound_of
from qwen2audio_jax.plan.search import Refusal
from qwen2audio_jax.plan.stages import Stage
from qwen2audio_jax.plan.topology import abstract_mesh
from qwen2audio_jax.plan.work import Work, work_of


def _work(plan: Plan, stage: Stage) -> Work:
    mesh = abstract_mesh(plan.request.data, plan.request.model)
    request = plan.request
    return work_of(stage, request.config, plan.shapes, mesh=mesh, cache_dtype=request.cache, weights=request.stored)


def bounds(plan: Plan) -> dict[Stage, Bound]:
    """The minimum time of every measured stage."""
    chip = plan.request.topology.chip
    return {
        stage: bound_of(_work(plan, stage), measured.exchanges, chip=chip) for stage, measured in plan.stages.items()
    }


def _stage(plan: Plan, stage: Stage, bound: Bound) -> dict[str, Any]:
    measured, work = plan.stages[stage], _work(plan, stage)
    return {
        "temporary_bytes_per_chip": measured.temporary,
        "peak_bytes_per_chip": measured.peak,
        "collectives": summary(measured.exchanges),
        "sent_bytes_per_chip": round(sum(one.sent for one in measured.exchanges)),
        "flops_per_chip": work.flops,
        "bytes_per_chip": work.bytes,
        "compiler_flops_per_chip": measured.flops,
        "compiler_bytes_per_chip": measured.bytes_accessed,
        "least_seconds": bound.seconds,
        "least_seconds_of": asdict(bound),
        "compile_seconds": None if measured.seconds is None else round(measured.seconds, 1),
    }


def _refusal(refusal: Refusal | None) -> dict[str, Any] | None:
    return None if refusal is None else asdict(refusal)


def _assumptions(plan: Plan) -> list[str]:
    request = plan.request
    heard = f"with one clip of {clip_seconds(request):g} s" if request.clip_frames else "without a clip"
    own = [f"every prompt has {request.prompt_tokens} tokens, {heard}; all clips and all prompts go in one call each"]
    if request.weights == INT8:
        own.append(f"encoder, projector, norms, biases and the computation are {request.config.dtype}")
    return [*own, *(arithmetic.ASSUMPTIONS if plan.machine.by == "arithmetic" else ()), *ASSUMPTIONS]


def roofline(plan: Plan) -> dict[str, float] | None:
    """Upper bounds on the rates of the requested batch, over all chips; None if it does not fit."""
    if not plan.fits:
        return None
    least = bounds(plan)
    step = least["decode"].seconds
    answer = (
        sum(bound.seconds for bound in least.values()) + (plan.request.max_new_tokens - 2) * step
    )  # the first token is the prefill's
    return {
        "decode_step_seconds": step,
        "tokens_per_second": plan.request.batch / step,
        "clips_per_second": plan.request.batch / answer,
    }


def report(plan: Plan, *, name: str, job: Job | None = None) -> dict[str, Any]:
    """The full report of a plan.

    Args:
        plan: for a request.
        name: of the configuration.
        job: a number of clips, whose chip-hours are added.
    """
    request, chip, least = plan.request, plan.request.topology.chip, bounds(plan)
    largest = plan.largest
    result = {
        "config": name,
        "topology": request.topology.name,
        "chips": request.topology.chips,
        "chip": {
            key: value for key, value in asdict(chip).items() if key not in ("libtpu", "libtpu_options", "aliases")
        },
        "mesh": {"data": request.data, "model": request.model, "num_slices": request.num_slices},
        "by": plan.machine.by,
        "versions": plan.versions,
        "batch": request.batch,
        "prompt_tokens": request.prompt_tokens,
        "max_new_tokens": request.max_new_tokens,
        "clip_seconds": clip_seconds(request),
        "shapes": asdict(plan.shapes),
        "weights": request.weights,
        "cache": request.cache,
        "mode": request.mode,
        "attention": plan.machine.attention,
        "fits": plan.fits,
        "limit_bytes_per_chip": plan.machine.limit,
        "weights_bytes_per_chip": plan.weights,
        "cache_bytes_per_chip": plan.cache,
        "temporary_bytes_per_chip": max((one.temporary for one in plan.stages.values()), default=None),
        "peak_bytes_per_chip": plan.peak,
        "refusal": _refusal(plan.refusal),
        "largest_batch": None if largest is None else largest.rows,
        "next_batch": None if largest is None else _refusal(largest.refusal),
        "stages": {stage: _stage(plan, stage, least[stage]) for stage in plan.stages},
        "roofline": roofline(plan),
        "transcription": transcription(plan),
        "assumptions": _assumptions(plan),
    }
    if job is not None:
        result["job"] = hours_of(job, plan) if plan.fits else None
    return result

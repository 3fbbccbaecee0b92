"""Sampling: logits of the last position to the next token, by penalty, filters and draw. Pure and jittable.

Rows are independent: a token depends on its row's logits, the ids in that row, and (seed, step), never on the other
rows, the padding of the batch or of the vocabulary, or the sharding of the arrays.

The order of operations is the reference's (transformers, `GenerationMixin._get_logits_processor`): repetition penalty,
repeated n-grams, minimum length, the caller's own edits, temperature, top-k, top-p, min-p; the last four only when
sampling.
"""

import functools
import operator
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qwen2audio_jax.generation.guides import Guidance
from qwen2audio_jax.generation.sampler_state import SamplerState, constrained
from qwen2audio_jax.generation.sampling_params import SamplingParams
from qwen2audio_jax.parallel.sharding import constrain

Mode = Literal["greedy", "sample"]


class NextToken(NamedTuple):
    """The result of one sampling step."""

    tokens: jax.Array
    """[B] int32."""
    log_probs: jax.Array
    """[B] float32."""
    state: SamplerState


def process_logits(logits: jax.Array, state: SamplerState, params: SamplingParams) -> jax.Array:
    """Logits processors of both greedy and sampled tokens: penalty, repeated n-grams, minimum length, the caller's.

    Source: `RepetitionPenaltyLogitsProcessor`, `NoRepeatNGramLogitsProcessor`, `MinNewTokensLengthLogitsProcessor`.

    Args:
        logits: [B, V] float32; -inf where the vocabulary is padded.
        state: of the same rows.
        params: the settings.

    Returns:
        [B, V] float32.
    """
    penalty = _column(params.repetition_penalty)
    penalised = jnp.where(logits < 0, logits * penalty, _divide(logits, penalty))
    scores = jnp.where(state.seen, penalised, logits)
    ids = jnp.arange(logits.shape[-1])
    stops = jnp.moveaxis(_column(params.eos_token_ids), -2, 0)
    is_eos = functools.reduce(operator.or_, (ids == stop for stop in stops))  # [V] or [B, V]
    too_early = state.step < params.min_new_tokens  # [B]
    scores = jnp.where((too_early[:, None] & is_eos) | _repeats(state, params, vocab_size=len(ids)), -jnp.inf, scores)
    return scores if params.edit is None else params.edit(state.ids, scores)


def _repeats(state: SamplerState, params: SamplingParams, *, vocab_size: int) -> jax.Array:
    """[B, V] bool: tokens that would complete an n-gram which is in the row already."""
    sizes = jnp.broadcast_to(params.no_repeat_ngram_size, state.length.shape)
    largest = jnp.max(params.no_repeat_ngram_size)  # of one setting for all rows, devices need not ask each other
    nothing = jnp.zeros((len(sizes), vocab_size), bool)

    def found() -> jax.Array:
        ids, size, length = state.ids, sizes[:, None], state.length[:, None]
        places = jnp.arange(ids.shape[1])

        def agree(back: jax.Array, same: jax.Array) -> jax.Array:
            """Where the token `back` places before is also the one `back` places before the end."""
            last = jnp.take_along_axis(ids, jnp.maximum(length - back, 0), axis=1)
            return same & ((jnp.roll(ids, back, axis=1) == last) | (back >= size))

        ends = (places >= size - 1) & (places < length) & (size > 0)
        ends = jax.lax.fori_loop(1, largest, agree, ends)
        return nothing.at[jnp.arange(len(sizes))[:, None], ids].max(ends)

    # Most calls have no such row, and then nothing is compared.
    return jax.lax.cond(largest > 0, found, lambda: nothing)


def candidates(scores: jax.Array, params: SamplingParams, *, count: int) -> tuple[jax.Array, jax.Array]:
    """The distribution to draw from: temperature, then top-k, top-p and min-p.

    As in the reference, every token tied with the k-th is kept (if there are no more of them than C holds), and top-p
    removes the least probable tokens as long as their sum is at most 1 - top_p, but never the last one. Of several
    equally probable tokens top-p keeps the lower ids; the reference leaves that choice to a sort that is not stable.

    Source: `TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`.

    Args:
        scores: [B, V] float32, the result of `process_logits`.
        params: the settings.
        count: C, static. V, or enough for top_k and possible ties with the k-th.

    Returns:
        ids [B, C] int32, most probable first and among equals the lower id first; log-probabilities [B, C] float32,
        -inf for removed tokens, all of which are at the end.
    """
    return _filtered(*_descending(_divide(scores, _column(params.temperature)), count), params)


def draw(ids: jax.Array, log_probs: jax.Array, seeds: jax.Array, steps: jax.Array) -> jax.Array:
    """One token a row by inverting the cumulative distribution in the order of the candidates.

    The uniform number of a row depends only on the Threefry key (seed, step).

    Args:
        ids: [B, C] int32 and
        log_probs: [B, C] float32, from `candidates`.
        seeds: [B] uint32.
        steps: [B] int32.

    Returns:
        [B] int32.
    """

    def uniform(seed, step):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step))

    last = jnp.sum(log_probs > -jnp.inf, axis=-1, keepdims=True) - 1  # [B, 1]
    cumulative = _prefix_sums(jnp.exp(log_probs))
    targets = jax.vmap(uniform)(seeds, steps)[:, None] * jnp.take_along_axis(cumulative, last, axis=-1)
    # Rounding may make the sums decrease by one unit in the last place, or the product equal to its factor.
    chosen = jnp.minimum(jnp.sum(cumulative <= targets, axis=-1, keepdims=True), last)
    return jnp.take_along_axis(ids, chosen, axis=-1)[:, 0]


@jax.named_scope("sample")
def next_token(
    logits: jax.Array, state: SamplerState, params: SamplingParams, *, mode: Mode, guidance: Guidance | None = None
) -> NextToken:
    """The next token of every row.

    A finished row emits the padding id with log-probability 0, and its state does not change.

    Args:
        logits: [B, V] float32 of the last position; -inf where the vocabulary is padded.
        state: of the same rows. The decoding loop does not donate it: the host reads `finished` one step later.
        params: the settings.
        mode: static. "greedy" takes the most probable token (the lowest id among equals) after penalty and minimum
            length; "sample" draws.
        guidance: what the rows' guides say of their next tokens; None: nothing.

    Returns:
        tokens [B] int32; log_probs [B] float32, the tokens' log-probabilities under the model's own distribution: the
        log-softmax of `logits`, before penalty, filters and temperature, so that they are comparable between settings
        and NaN where the logits hold one; the state after.
    """
    scores = process_logits(logits, state, params)
    if guidance is not None:
        scores = _allowed_scores(_preferred_scores(scores, guidance), logits, jnp.asarray(guidance.allowed))
    if mode == "greedy":
        chosen = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    else:
        chosen = _sample(scores, state, params)
    log_probs = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    running = ~state.finished
    is_eos = (chosen[:, None] == params.eos_token_ids).any(axis=-1)
    rows = jnp.arange(logits.shape[0])
    after = replace(
        state,
        seen=state.seen.at[rows, chosen].max(running),
        ids=state.ids.at[rows, state.length].max(jnp.where(running, chosen, -1)),
        length=state.length + running,
        step=state.step + running,
        finished=state.finished | is_eos,
    )
    return NextToken(
        tokens=constrain(jnp.where(running, chosen, params.pad_token_id), "batch"),
        log_probs=constrain(jnp.where(running, log_probs, 0.0), "batch"),
        state=constrained(after),
    )


def _preferred_scores(scores: jax.Array, guidance: Guidance) -> jax.Array:
    """Scores [B, V] with the bonuses of the tokens that rows prefer; bit by bit the same in rows without any."""
    rows = jnp.arange(len(scores))[:, None]
    return constrain(scores.at[rows, guidance.preferred].add(guidance.bonus, mode="drop"), "batch", "vocab")


def _allowed_scores(scores: jax.Array, logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Scores [B, V] of the tokens that a grammar allows; where other rules leave none of these, they give way."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [B, W, 32]
    kept = constrain(bits.reshape(len(allowed), -1)[:, : scores.shape[-1]].astype(bool), "batch", "vocab")
    some = (kept & (scores > -jnp.inf)).any(axis=-1, keepdims=True)
    return jnp.where(kept, jnp.where(some, scores, logits), -jnp.inf)


def _sample(scores: jax.Array, state: SamplerState, params: SamplingParams) -> jax.Array:
    """[B] int32, drawn from the top candidates.

    If more tokens tie with the k-th than there are candidates, only those with the lowest ids are considered, where the
    reference keeps all. A second branch over the whole vocabulary would be exact there too, but takes a TPU's compiler
    a minute and a half.
    """
    # A row's scores are gathered once; left sharded, each of the small steps below would communicate between devices.
    scaled = constrain(_divide(scores, _column(params.temperature)), "batch", None)
    count = scores.shape[-1] if params.candidate_count is None else min(params.candidate_count, scores.shape[-1])
    ids, log_probs = _filtered(*_descending(scaled, count), params)
    return draw(ids, log_probs, state.seeds, state.step)


def _descending(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of [B, V] and their ids, in descending order, among equals the lower id first."""
    # The top-k primitive distinguishes -0.0 from 0.0, the comparisons of the reference do not.
    values = jnp.where(values == 0, 0.0, values)
    if count < values.shape[-1]:
        return jax.lax.top_k(values, count)
    ids = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), values.shape)
    values, ids = jax.lax.sort((-values, ids), num_keys=1, is_stable=True)
    return -values, ids


def _kth(values: jax.Array, params: SamplingParams) -> jax.Array:
    """[B, 1]: the top_k-th of the values [B, C], which are in descending order."""
    place = jnp.clip(params.top_k, 1, values.shape[-1]) - 1
    if place.ndim:
        return jnp.take_along_axis(values, _column(place), axis=-1)
    return jax.lax.dynamic_slice_in_dim(values, place, 1, axis=-1)


def _filtered(values: jax.Array, ids: jax.Array, params: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """Top-k, top-p and min-p on values [B, C] in descending order: `ids` and the log-probabilities [B, C]."""
    count = values.shape[-1]
    places = jnp.arange(count)
    kept = (values >= _kth(values, params)) | _column(params.top_k == 0)
    values = jnp.where(kept & (places < _column(params.candidates)), values, -jnp.inf)

    # The sums below cover positive weights only, from a fixed end, by a scan whose rounding at a position depends only
    # on that position. So any number of impossible tokens (a padded vocabulary) may follow without changing a bit.
    weights = jnp.exp(values - values[:, :1])
    positive = jnp.sum(weights > 0, axis=-1, keepdims=True)  # [B, 1], at least 1
    ascending = jnp.take_along_axis(weights, jnp.clip(positive - 1 - places, 0, count - 1), axis=-1)
    sums = _prefix_sums(jnp.where(places < positive, ascending, 0.0))
    total = jnp.take_along_axis(sums, positive - 1, axis=-1)
    removed = jnp.sum((sums <= _column(params.tail_mass) * total) & (places < positive), axis=-1, keepdims=True)
    likely = jnp.sum((weights >= _column(params.min_p)) & (places < positive), axis=-1, keepdims=True)
    nucleus = jnp.maximum(jnp.minimum(positive - removed, likely), 1)
    weights = jnp.where(places < nucleus, weights, 0.0)
    total = jnp.take_along_axis(_prefix_sums(weights), nucleus - 1, axis=-1)
    log_probs = jnp.where(places < nucleus, values - values[:, :1] - jnp.log(total), -jnp.inf)
    return ids, log_probs


def _prefix_sums(values: jax.Array) -> jax.Array:
    """Inclusive prefix sums along the last axis, whose rounding depends only on the position."""
    return jax.lax.associative_scan(jnp.add, values, axis=-1)


def _column(setting: jax.Array) -> jax.Array:
    """A setting with an axis behind: [1] of one for all rows, [B, 1] of one a row."""
    return setting[..., None]


def _divide(values: jax.Array, scalar: jax.Array) -> jax.Array:
    """Correctly rounded quotients: XLA would multiply by the reciprocal, one last bit off the reference."""
    return values / jax.lax.optimization_barrier(jnp.broadcast_to(scalar, values.shape))

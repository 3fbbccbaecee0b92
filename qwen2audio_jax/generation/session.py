"""Sessions: the key/value cache of one prompt, reused by later calls that share a prefix with it.

The module sits between `api`, which checks inputs and runs the decoding, and `prefix`, which finds the cached prefix.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qwen2audio_jax.generation import decoding as engine
from qwen2audio_jax.generation.inputs import CheckedInputs, check_inputs
from qwen2audio_jax.generation.memory import cache_bytes, check_fits
from qwen2audio_jax.generation.outputs import Tokenizer, collect, pieces
from qwen2audio_jax.generation.padded_shapes import padded_capacity, padded_row_count, padded_tokens
from qwen2audio_jax.generation.prefix import (
    CachedPrefix,
    Continuation,
    common_prefix_length,
    copy_prefix,
    first_tokens,
    plan_continuation,
    row_tokens,
    text_tokens,
    without_prefix,
)
from qwen2audio_jax.generation.stopping import StopMatcher
from qwen2audio_jax.generation.text_stream import TextStream
from qwen2audio_jax.model.kv_cache import KVCache
from qwen2audio_jax.parallel.process_rows import Sizes, share_of, to_mesh

if TYPE_CHECKING:
    from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration


class Session:
    """Keys and values of one sequence of tokens and clips, kept on the model's mesh between calls.

    `generate` and `stream` take the whole prompt, like the model's own methods, and return the same result: greedy, in
    float32, the same tokens; sampled, with the same seed, likewise. The session finds the longest held prefix of the
    prompt, comparing clips by their features, and computes only the rest: a clip in the prefix is not encoded again. So
    a second question about a clip, the next turn of a chat, a regenerated answer and a retracted message are all the
    same call, and always correct: if a re-rendered conversation is tokenised differently (for example at the boundary
    between an answer and the next turn) or leaves something out, more is computed. Passing only the new tokens would
    save the caller nothing but the features, and leave all these cases to the caller.

    After a call with one prompt the session holds that prompt and, of a single answer, the cached part. A call with
    several prompts, or several answers to one, works on copies of the common prefix, which the session then holds; so a
    session may start with a batch of questions about one clip. `fork` returns a second session with the same held
    sequence. After an interrupted call, or a stream that is left early, the session remains usable.

    It takes the memory of one prompt's cache until it is closed (`close`, or the end of a `with`) or dropped. It is for
    one caller at a time; while a stream is running it holds nothing, and other calls compute their whole prompt.

    Attributes:
        reused: [B] int32, number of tokens of each prompt of the last call that were taken from the cache.
    """

    def __init__(self, model: "Qwen2AudioForConditionalGeneration"):
        """Create an empty session; usually through `model.start`.

        Raises:
            ValueError: the model's mesh spans several processes.
        """
        if not share_of(model.mesh).alone:
            raise ValueError("a session runs in one process, and this model's mesh spans several: use generate")
        self._model = model
        self._held: CachedPrefix | None = None
        self._closed = False
        self.reused = np.zeros(0, np.int32)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory, that of a running stream when it ends; every later call is a ValueError."""
        self._held, self._closed = None, True

    @property
    def input_ids(self) -> np.ndarray:
        """The held tokens, [T] int32, with <|AUDIO|> for every audio vector."""
        if self._held is None:
            return np.zeros(0, np.int32)
        ids = self._held.tokens[:, 0]
        return np.where(ids < 0, self._model.config.audio_token_index, ids).astype(np.int32)

    def read(
        self,
        *,
        input_ids: Any,
        attention_mask: Any = None,
        input_features: Any = None,
        feature_attention_mask: Any = None,
    ) -> None:
        """Prefill one prompt, or a prefix of it, ahead of later calls; arguments as for `generate`.

        Raises:
            ValueError: several prompts, inputs that do not fit, or a cache beyond the devices' memory.
        """
        self._check_open()
        model = self._model
        checked = check_inputs(input_ids, attention_mask, input_features, feature_attention_mask, config=model.config)
        if len(checked.rows.ids) != 1:
            raise ValueError(
                f"a session holds one prompt, not {len(checked.rows.ids)}: give what they have in common, and then all "
                "of them to its generate"
            )
        model._check_positions(checked.sizes.tokens, 0)
        self._read(checked)

    def generate(
        self,
        *,
        input_ids: Any,
        attention_mask: Any = None,
        input_features: Any = None,
        feature_attention_mask: Any = None,
        seed: int | Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Any:
        """`model.generate` of whole prompts, reusing the held prefix; same arguments, result and errors."""
        inputs = (input_ids, attention_mask, input_features, feature_attention_mask)
        turn = _Turn(self)
        decoding, matchers = turn.decoding(inputs, options=options, seed=seed, tokenizer=tokenizer)
        try:
            output = collect(decoding, np.atleast_2d(np.asarray(input_ids)), matchers=matchers)
        finally:
            turn.end(decoding)
        return output if return_dict_in_generate else output.sequences

    def stream(
        self,
        *,
        input_ids: Any,
        tokenizer: Tokenizer,
        attention_mask: Any = None,
        input_features: Any = None,
        feature_attention_mask: Any = None,
        seed: int | Sequence[int] | None = None,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Generator[str, None, str]:
        """`model.stream` of a whole prompt, reusing the held prefix; same arguments, pieces and errors."""
        inputs = (input_ids, attention_mask, input_features, feature_attention_mask)
        turn = _Turn(self)
        decoding, matchers = turn.decoding(inputs, options=options, seed=seed, tokenizer=tokenizer, streamed=True)
        text = TextStream(partial(tokenizer.decode, skip_special_tokens=skip_special_tokens))
        return turn.until_the_end(decoding, pieces(decoding, text, matchers=matchers))

    def fork(self) -> "Session":
        """A second session with the same held sequence; the cache is copied on the next call of either."""
        self._check_open()
        other = Session(self._model)
        if self._held is not None:
            self._held = other._held = replace(self._held, shared=True)
        return other

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this session is closed: begin another with model.start()")

    def _read(self, checked: CheckedInputs) -> None:
        model, turn = self._model, _Turn(self)
        capacity = padded_capacity(checked.sizes.tokens, config=model.config)
        size = self._size(rows=padded_row_count(1, mesh=model.mesh), capacity=capacity)
        check_fits(model.config.text_config, **size, spare=self._bytes_held())
        with jax.set_mesh(model.mesh):
            turn.begin(checked, checked.sizes, capacity)
        self._held = turn.held

    def _bytes_held(self) -> int:
        if self._held is None:
            return 0
        cache = self._held.cache
        return cache_bytes(
            self._model.config.text_config, **self._size(rows=len(cache.lengths), capacity=cache.capacity)
        )

    def _size(self, *, rows: int, capacity: int) -> dict[str, Any]:
        """Arguments of `cache_bytes` and `check_fits` for a cache of the model."""
        dtype = engine.cache_dtype(self._model.config, self._model.cache)
        return {"rows": rows, "capacity": capacity, "dtype": dtype, "mesh": self._model.mesh}


class _Turn:
    """One call of a session.

    Attributes:
        held: the call's prompt once it has been prefilled; None before, and for several prompts.
    """

    def __init__(self, session: Session):
        self.held: CachedPrefix | None = None
        self._session, self._model = session, session._model

    def decoding(self, inputs: tuple[Any, ...], **arguments: Any) -> tuple[engine.Decoding, list[StopMatcher]]:
        """The decoding of a call with checked inputs; the held prefix is looked up when it starts."""
        self._session._check_open()
        one = np.ndim(inputs[0]) < 2 or len(inputs[0]) == 1
        # The memory of the held cache is available to the single prompt that replaces it.
        spare = self._session._bytes_held() if one else 0
        return self._model._decoding(inputs, **arguments, begin=self.begin, spare=spare)

    def begin(self, checked: CheckedInputs, sizes: Sizes, capacity: int) -> engine.Prompted:
        """Prefill prompts after the prefix that the session holds."""
        session, model = self._session, self._model
        session._check_open()  # a stream may start after the session was closed
        rows, one = row_tokens(checked), len(checked.rows.ids) == 1
        if not one:
            self._read_common(checked, rows)
        plan = plan_continuation(rows, session._held, capacity=capacity, config=model.config)
        session.reused = plan.starts
        if plan.starts.any():
            prompted = self._go_on(checked, plan)
        else:
            if one:
                session._held = None
            prompted = model._begin(checked, sizes, capacity)
        if one:
            self.held = CachedPrefix(rows[0], prompted.cache)
        return prompted

    def _read_common(self, checked: CheckedInputs, rows: list[np.ndarray]) -> None:
        """Prefill the common prefix of several prompts into the session, if that leaves each of them less work."""
        session, config = self._session, self._model.config
        shared = min([len(row) - 1 for row in rows] + [common_prefix_length(rows[0], row) for row in rows[1:]])
        starts = plan_continuation(rows, session._held, capacity=0, config=config).starts
        longest = max(len(row) for row in rows)
        now = max(len(row) - start for row, start in zip(rows, starts, strict=True))
        if shared and padded_tokens(longest - shared, config=config) < padded_tokens(now, config=config):
            session._read(first_tokens(checked, shared))

    def _go_on(self, checked: CheckedInputs, plan: Continuation) -> engine.Prompted:
        model, mesh = self._model, self._model.mesh
        after = without_prefix(checked, plan.starts)
        prompt, padded = model._prompt(after, after.sizes)
        cache = self._cache(plan, rows=len(padded))
        logits, cache = engine.prefill(model.params, prompt, cache, cfg=model.config, window=plan.capacity)
        ids = np.zeros((len(padded), padded_tokens(checked.sizes.tokens, config=model.config)), np.int32)
        for whole, row in zip(ids, checked.rows.ids, strict=False):
            whole[: len(row)] = row
        lengths = padded.copy()
        lengths[: len(plan.starts)] += plan.starts
        state = engine.sampler_state(
            to_mesh(mesh, ids, "batch", "token"), lengths, vocab_size=logits.shape[-1], mesh=mesh
        )
        return engine.Prompted(logits, cache, state)

    def _cache(self, plan: Continuation, *, rows: int) -> KVCache:
        """The held sequence in a cache of the needed rows and positions: the session's own, if one prompt fits in."""
        session, model, held = self._session, self._model, self._session._held
        assert held is not None
        one = len(plan.starts) == 1
        starts = np.zeros(rows, np.int32)
        starts[: len(plan.starts)] = plan.starts
        if one and not held.shared and held.cache.capacity == plan.capacity:
            session._held = None
            return replace(held.cache, lengths=to_mesh(model.mesh, starts, "batch"))
        check_fits(model.config.text_config, **session._size(rows=rows, capacity=plan.capacity))
        cache = copy_prefix(held, starts, capacity=plan.capacity, mesh=model.mesh)
        if one:
            session._held = None
        return cache

    def end(self, decoding: engine.Decoding) -> None:
        """Hand the session the sequence that its next call can resume from, however this call ended."""
        if self.held is None or self._session._closed:
            return
        held = self.held
        if decoding.rows == 1 and decoding.cache is not None:
            # The last token of an answer ended by its limit is not cached; a cached one may not have been read.
            known = [int(tokens[0]) for tokens in decoding.read[: decoding.appended]]
            held = CachedPrefix(np.concatenate([held.tokens, text_tokens(np.asarray(known, np.int64))]), decoding.cache)
        self._session._held = held if held.alive else None

    def until_the_end(
        self, decoding: engine.Decoding, generator: Generator[str, None, str]
    ) -> Generator[str, None, str]:
        """Run the generator, and `end` when it is exhausted or closed."""
        try:
            return (yield from generator)
        finally:
            self.end(decoding)

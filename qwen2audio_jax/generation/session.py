"""Sessions: the keys and values of one prompt, kept for the calls that come after it.

`prefix` says how much of a prompt is known already; `run` computes the rest of it.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from qwen2audio_jax.config import Qwen2AudioTextConfig
from qwen2audio_jax.generation.arguments import Arguments
from qwen2audio_jax.generation.call import (
    Call,
    cache_capacity,
    check_one_row,
    check_positions,
    first_capacity,
    prefill_bytes,
    prepare_call,
)
from qwen2audio_jax.generation.decoding import Progress, Prompted, Step, decode
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.inputs import CheckedInputs, check_inputs
from qwen2audio_jax.generation.memory import cache_bytes, check_fits
from qwen2audio_jax.generation.outputs import collect, pieces
from qwen2audio_jax.generation.padded_shapes import padded_capacity, padded_row_count, padded_tokens
from qwen2audio_jax.generation.prefix import (
    CachedPrefix,
    Continuation,
    Prefix,
    common_prefix_length,
    copy_prefix,
    first_tokens,
    plan_continuation,
    row_tokens,
    text_tokens,
)
from qwen2audio_jax.generation.run import extend_prefix, forked, prefill_prompts
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.stopping import Tokenizer
from qwen2audio_jax.generation.streamers import ended, fed
from qwen2audio_jax.generation.text_stream import TextStream
from qwen2audio_jax.parallel.process_rows import Sizes, share_of, to_mesh


class Session:
    """Keys and values of one sequence of tokens and clips, kept on the model's mesh between calls.

    `generate` and `stream` take whole prompts, exactly as the model's own do, and return what those would return:
    greedy, in float32, the same tokens; sampled, with the same seed, too. The session finds the longest beginning of
    the prompt that it holds, with clips compared by their features, and computes what comes after: a known clip is not
    encoded again. So a second question about a clip, the next turn of a chat, another answer to the same question and a
    message taken back are all one call. Where a conversation that is rendered again splits into other tokens (at the
    seam between an answer and the next turn, say) or leaves something out, more is computed, and nothing goes wrong.

    After a call with one prompt the session holds that prompt and, of a single answer, what the cache has of it. A call
    with several prompts, or several answers to one, works on copies of their common beginning, which the session then
    holds; so a batch of questions about one clip may come first. `fork` gives a second session that begins with what
    this one holds. After a call that is interrupted, or a stream that is left early, the session still works.

    It takes the memory of one prompt's cache until it is closed (`close`, or the end of a `with`) or dropped. It is for
    one caller at a time; while a stream is running it holds nothing, and other calls compute their whole prompt.

    Attributes:
        reused: [B] int32, how many tokens of each prompt of the last call were in the cache already.
    """

    def __init__(self, runtime: Runtime, *, generation_config: GenerationConfig):
        """An empty session; `model.session` makes it.

        Raises:
            ValueError: the mesh spans several processes.
        """
        if not share_of(runtime.mesh).alone:
            raise ValueError("a session runs in one process, and this model's mesh spans several: use generate")
        self._runtime = runtime
        self._generation_config = generation_config
        self._held: CachedPrefix | None = None
        self._closed = False
        self.reused = np.zeros(0, np.int32)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign what the session itself keeps; an AttributeError says where other things go."""
        if not name.startswith("_") and name != "reused":
            raise AttributeError(f"a session's {name} cannot be assigned: pass options to its generate or stream")
        object.__setattr__(self, name, value)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory, that of a running stream when it ends; every later call is a ValueError."""
        self._held, self._closed = None, True

    @property
    def input_ids(self) -> np.ndarray:
        """[T] int32: the tokens that are held, <|AUDIO|> for every audio vector."""
        if self._held is None:
            return np.zeros(0, np.int32)
        ids = self._held.tokens[:, 0]
        return np.where(ids < 0, self._runtime.config.audio_token_index, ids).astype(np.int32)

    def read(
        self,
        *,
        input_ids: Any,
        attention_mask: Any = None,
        input_features: Any = None,
        feature_attention_mask: Any = None,
    ) -> None:
        """Prefill one prompt, or the beginning of later ones; arguments as for `generate`.

        Raises:
            ValueError: several prompts, inputs that do not fit, or a cache beyond the devices' memory.
        """
        self._check_open()
        config = self._runtime.config
        inputs = check_inputs(input_ids, attention_mask, input_features, feature_attention_mask, config=config)
        if len(inputs.rows.ids) != 1:
            raise ValueError(
                f"a session holds one prompt, not {len(inputs.rows.ids)}: give what they have in common, and then all "
                "of them to its generate"
            )
        check_positions(inputs.sizes.tokens, 0, config=config)
        self._read(inputs)

    def generate(
        self,
        inputs: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        input_features: Any = None,
        feature_attention_mask: Any = None,
        seed: int | Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Any:
        """Continue whole prompts, as `model.generate` does: arguments, result and errors are the same."""
        arguments = Arguments.of(
            inputs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            seed=seed,
            tokenizer=tokenizer,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            options=options,
        )
        with ended(streamer):
            call, progress = self._prepare(arguments)
            steps = fed(self._steps(call, progress), streamer, prompts=call.ends.prompts)
            output = collect(steps, call, progress)
        return output if return_dict_in_generate else output.sequences

    def stream(
        self,
        inputs: Any = None,
        *,
        tokenizer: Tokenizer,
        input_ids: Any = None,
        attention_mask: Any = None,
        input_features: Any = None,
        feature_attention_mask: Any = None,
        seed: int | Sequence[int] | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> Generator[str, None, str]:
        """Continue one whole prompt, as `model.stream` does: arguments, pieces and errors are the same."""
        arguments = Arguments.of(
            inputs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            seed=seed,
            tokenizer=tokenizer,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            options=options,
        )
        call, progress = self._prepare(arguments)
        check_one_row(call)
        text = TextStream(partial(tokenizer.decode, skip_special_tokens=skip_special_tokens))
        return pieces(self._steps(call, progress), call, progress, text=text)

    def fork(self) -> "Session":
        """A second session that begins with what this one holds; the cache is copied when one of the two resumes."""
        self._check_open()
        other = Session(self._runtime, generation_config=self._generation_config)
        if self._held is not None:
            self._held = other._held = replace(self._held, shared=True)
        return other

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this session is closed: begin another with model.session()")

    def _prepare(self, arguments: Arguments) -> tuple[Call, Progress]:
        self._check_open()
        call = prepare_call(self._runtime, arguments, defaults=self._generation_config)
        padded = partial(padded_row_count, mesh=self._runtime.mesh, dtype=self._runtime.config.dtype)
        # Several answers to one prompt take a cache beside the one that they are copied from.
        rows = padded(call.prompts) + (padded(call.rows) if call.copies > 1 else 0)
        size = self._size(rows=rows, capacity=cache_capacity(self._runtime, call))
        # The memory of what is held becomes that of the one prompt that takes its place.
        check_fits(self._config, **size, spare=self._bytes_held() if call.prompts == 1 else 0)
        return call, Progress.of(self._runtime, call)

    def _steps(self, call: Call, progress: Progress) -> Generator[Step, None, None]:
        """`run.steps` from where the prompts part from what the session holds when the first step is asked for."""
        self._check_open()  # a stream may begin after it was closed
        capacity = first_capacity(self._runtime, call)
        if call.prompts > 1:
            prompted = self._prompts(call.inputs, call.sizes, capacity=capacity)
            yield from decode(self._runtime, call, forked(self._runtime, call, prompted), progress)
            return
        prompted = self._prompts(call.inputs, call.sizes, capacity=capacity)
        prompt = CachedPrefix(row_tokens(call.inputs)[0], prompted.cache)
        try:
            yield from decode(self._runtime, call, forked(self._runtime, call, prompted), progress)
        finally:
            self._keep(_with_answer(prompt, progress) if call.rows == 1 else prompt)

    def _keep(self, prefix: CachedPrefix) -> None:
        """Hold what the next call can resume from, however this one ended."""
        if not self._closed:
            self._held = prefix if prefix.alive else None

    def _prompts(self, inputs: CheckedInputs, sizes: Sizes, *, capacity: int) -> Prompted:
        """The prompts prefilled; of what is held only the rest of them is computed."""
        rows, config = row_tokens(inputs), self._runtime.config
        if len(rows) > 1:
            self._read_common(inputs, rows)
        plan = plan_continuation(rows, self._held, capacity=capacity, config=config)
        self.reused = plan.starts
        rows_padded = padded_row_count(sizes.rows, mesh=self._runtime.mesh, dtype=config.dtype)
        if self._held is not None and plan.starts.any():
            return extend_prefix(self._runtime, inputs, self._take(self._held, plan, rows=rows_padded))
        size = self._size(rows=rows_padded, capacity=capacity)
        freed = self._bytes_held() if len(rows) == 1 else 0
        check_fits(self._config, **size, spare=freed - prefill_bytes(self._runtime, inputs, sizes))
        if len(rows) == 1:
            self._held = None
        return prefill_prompts(self._runtime, inputs, sizes, capacity=capacity)

    def _read_common(self, inputs: CheckedInputs, rows: list[np.ndarray]) -> None:
        """Hold what several prompts have in common, if each of them then has less to compute."""
        config = self._runtime.config
        shared = min([len(row) - 1 for row in rows] + [common_prefix_length(rows[0], row) for row in rows[1:]])
        starts = plan_continuation(rows, self._held, capacity=0, config=config).starts
        longest = max(len(row) for row in rows)
        now = max(len(row) - start for row, start in zip(rows, starts, strict=True))
        if shared and padded_tokens(longest - shared, config=config) < padded_tokens(now, config=config):
            self._read(first_tokens(inputs, shared))

    def _read(self, inputs: CheckedInputs) -> None:
        capacity = padded_capacity(inputs.sizes.tokens, config=self._runtime.config)
        prompted = self._prompts(inputs, inputs.sizes, capacity=capacity)
        self._held = CachedPrefix(row_tokens(inputs)[0], prompted.cache)

    def _take(self, held: CachedPrefix, plan: Continuation, *, rows: int) -> Prefix:
        """What is held in as many rows and positions as are needed: its own cache, if one prompt fits in it."""
        runtime, one = self._runtime, len(plan.starts) == 1
        starts = np.zeros(rows, np.int32)
        starts[: len(plan.starts)] = plan.starts
        if one and not held.shared and held.cache.capacity == plan.capacity:
            self._held = None
            return Prefix(replace(held.cache, lengths=to_mesh(runtime.mesh, starts, "batch")), plan.starts)
        check_fits(self._config, **self._size(rows=rows, capacity=plan.capacity))
        with jax.set_mesh(runtime.mesh):
            cache = copy_prefix(held, starts, capacity=plan.capacity, mesh=runtime.mesh)
        if one:
            self._held = None
        return Prefix(cache, plan.starts)

    def _bytes_held(self) -> int:
        if self._held is None:
            return 0
        cache = self._held.cache
        size = self._size(rows=len(cache.lengths), capacity=cache.capacity)
        return cache_bytes(self._config, **size)

    @property
    def _config(self) -> Qwen2AudioTextConfig:
        return self._runtime.config.text_config

    def _size(self, *, rows: int, capacity: int) -> dict[str, Any]:
        """A cache of the model's, as `cache_bytes` and `check_fits` take it."""
        runtime = self._runtime
        return {"rows": rows, "capacity": capacity, "dtype": np.dtype(runtime.cache_dtype), "mesh": runtime.mesh}


def _with_answer(prompt: CachedPrefix, progress: Progress) -> CachedPrefix:
    """A prompt, and of its answer what is in the cache and has been read.

    The last token of an answer that its limit ended is not in the cache; one that is may not have been read yet.
    """
    if progress.cache is None:
        return prompt
    known = [int(tokens[0]) for tokens in progress.read[: progress.appended]]
    answer = text_tokens(np.asarray(known, np.int64))
    return CachedPrefix(np.concatenate([prompt.tokens, answer]), progress.cache)

"""Calls: what `generate` is asked for, checked on the host before anything is computed."""

from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.arguments import Arguments
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.guides import Guide, make_guides
from qwen2audio_jax.generation.inputs import CheckedInputs, check_inputs
from qwen2audio_jax.generation.logits_processors import as_functions, logits_processors
from qwen2audio_jax.generation.memory import cache_bytes, check_fits
from qwen2audio_jax.generation.padded_shapes import padded_capacity, padded_row_count, prompt_groups
from qwen2audio_jax.generation.row_ends import RowEnds
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampling_params import SamplingParams, row_seeds, sampling_params
from qwen2audio_jax.generation.stopping import stop_matchers
from qwen2audio_jax.model.cache_pieces import PIECE
from qwen2audio_jax.parallel.process_rows import Prepared, Sizes, agree, share_of
from qwen2audio_jax.parallel.sharding import round_up

ROOM = 256
"""New tokens that a cache has room for at first. Every larger capacity is another program to compile."""


OWN_SETTINGS = ("max_new_tokens", "max_length", "stop_strings", "max_time")
"""Settings that each process of a mesh may have for itself: they are no part of the common program."""


@dataclass(frozen=True)
class Call:
    """One call, checked; for one run, as its ends are.

    Attributes:
        inputs: prompts and clips of this process.
        settings: the generation settings of the call.
        budget: most new tokens a row; at least 1.
        sizes: agreed between the processes: the most rows, tokens and budget of any of them.
        seeds: [rows] uint32.
        sampling: the settings as arrays.
        ends: what ends rows on the host.
        guides: what steers each row; empty for nothing.
    """

    inputs: CheckedInputs
    settings: GenerationConfig
    budget: int
    sizes: Sizes
    seeds: np.ndarray
    sampling: SamplingParams
    ends: RowEnds
    guides: list[Guide]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.inputs.rows.ids)

    @property
    def copies(self) -> int:
        """Continuations of each prompt; they come out next to each other."""
        return self.settings.num_return_sequences

    @property
    def rows(self) -> int:
        """Number of rows that come out."""
        return self.prompts * self.copies


def prepare_call(runtime: Runtime, arguments: Arguments, *, defaults: GenerationConfig) -> Call:
    """Check a call on this process, and agree on its shapes with the others.

    Raises:
        TypeError: an unknown option.
        ValueError: a value out of range, inputs that do not fit, or too many positions; or another process refused.
    """

    def check() -> tuple[Call, Prepared]:
        call = check_call(arguments, defaults=defaults, config=runtime.config)
        given_seeds = None if arguments.seed is None else call.seeds.tolist()
        said = (repr(call.settings), repr(given_seeds))
        own = (*call.inputs.arrays, *(np.frombuffer(text.encode(), np.uint8) for text in said))
        common = {**asdict(call.settings), **dict.fromkeys(OWN_SETTINGS)}
        edits = [getattr(each, "__qualname__", repr(each)) for each in as_functions("", arguments.logits_processor)]
        return call, Prepared(call.sizes, common=repr((common, edits)), inputs=own)

    call, sizes = agree(runtime.mesh, check)
    if arguments.seed is None and not share_of(runtime.mesh).alone:
        call = replace(call, seeds=row_seeds(sizes.draw, rows=call.rows))
    return replace(call, sizes=sizes)


def check_call(arguments: Arguments, *, defaults: GenerationConfig, config: Qwen2AudioConfig) -> Call:
    """Check a call of this process alone; errors as `prepare_call`."""
    settings = defaults.updated(**arguments.options)
    inputs = check_inputs(
        arguments.input_ids,
        arguments.attention_mask,
        arguments.input_features,
        arguments.feature_attention_mask,
        config=config,
    )
    rows = len(inputs.rows.ids) * settings.num_return_sequences
    ends = RowEnds(
        matchers=stop_matchers(settings.stop_strings, arguments.tokenizer, rows=rows),
        criteria=as_functions("stopping_criteria", arguments.stopping_criteria),
        prompts=np.repeat(np.atleast_2d(np.asarray(arguments.input_ids)), settings.num_return_sequences, axis=0),
        seconds=settings.max_time,
    )
    text = config.text_config
    sizes = {"vocab_size": text.vocab_size, "positions": text.max_position_embeddings}
    edit = logits_processors(arguments.logits_processor, **sizes)
    budget = settings.new_token_budget(inputs.rows.width)
    check_positions(inputs.sizes.tokens, budget, config=config)
    return Call(
        inputs=inputs,
        settings=settings,
        budget=budget,
        sizes=replace(inputs.sizes, budget=budget),
        seeds=row_seeds(arguments.seed, rows=rows),
        sampling=replace(sampling_params(settings, vocab_size=text.vocab_size), edit=edit),
        ends=ends,
        guides=make_guides(settings, arguments.tokenizer, rows=rows, vocab_size=text.vocab_size),
    )


def check_positions(prompt: int, new: int, *, config: Qwen2AudioConfig) -> None:
    """Raise a `ValueError` if so many prompt tokens and new ones are more than the model's positions."""
    limit = config.text_config.max_position_embeddings
    if prompt + new > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones make {prompt + new}, but the model has {limit} "
            "positions: shorten the prompt, or lower max_new_tokens"
        )


def check_one_row(call: Call) -> None:
    """Raise a `ValueError` for a call that cannot be streamed."""
    if call.rows != 1:
        raise ValueError(
            f"stream takes one prompt and returns one text, not {call.prompts} x {call.copies}: call it once for each, "
            "or use generate"
        )


def first_capacity(runtime: Runtime, call: Call) -> int:
    """Cache positions that a call begins with: `cache_capacity`, or less where that is far beyond its prompts.

    A step reads the whole cache, so answers that may be long and seldom are would be paid for from the first token on.
    """
    tokens = call.sizes.tokens + min(call.sizes.budget - 1, ROOM)
    return padded_capacity(tokens, config=runtime.config)


def cache_capacity(runtime: Runtime, call: Call) -> int:
    """Cache positions of a call. The last token's key and value are never read, so one less than its tokens."""
    return padded_capacity(call.sizes.tokens + call.sizes.budget - 1, config=runtime.config)


def check_memory(runtime: Runtime, call: Call) -> None:
    """Raise a `ValueError` if a call's cache is beyond the devices' memory."""
    share = share_of(runtime.mesh)
    padded = partial(padded_row_count, mesh=runtime.mesh, dtype=runtime.config.dtype)
    rows = padded(call.sizes.rows * call.copies)
    if not share.alone and call.copies > 1:
        rows += padded(call.sizes.rows)  # the cache that the copies are made from
    check_fits(
        runtime.config.text_config,
        rows=rows * share.groups,
        capacity=cache_capacity(runtime, call),
        dtype=np.dtype(runtime.cache_dtype),
        mesh=runtime.mesh,
        spare=-prefill_bytes(runtime, call.inputs, call.sizes),
    )


def prefill_bytes(runtime: Runtime, inputs: CheckedInputs, sizes: Sizes) -> int:
    """Bytes on each device of the keys and values that one prefill gives, before they are in the call's cache."""
    mesh, dtype = runtime.mesh, np.dtype(runtime.cache_dtype)
    groups = prompt_groups(inputs.rows.lengths.tolist(), config=runtime.config, mesh=mesh, sizes=sizes)
    return max(
        cache_bytes(
            runtime.config.text_config,
            rows=group.count * share_of(mesh).groups,
            capacity=round_up(group.width, PIECE),
            dtype=dtype,
            mesh=mesh,
        )
        for group in groups
    )

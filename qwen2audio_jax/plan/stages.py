"""The programs of a batch, lowered from shapes alone: encode, prefill and decode as `generate` runs them.

Each takes everything resident in memory as arguments, even if unused: every weight and the whole cache. So a program
that compiles fits beside them.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation import decoding
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.padded_shapes import prefill_rows
from qwen2audio_jax.generation.programs import program
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.sampler_state import SamplerState
from qwen2audio_jax.generation.sampling import Mode, NextToken
from qwen2audio_jax.generation.sampling_params import sampling_params
from qwen2audio_jax.model import qwen2_audio
from qwen2audio_jax.model.attention import AUTO, choose_attention
from qwen2audio_jax.model.cache_pieces import Piece
from qwen2audio_jax.model.kv_cache import KVCache, cache_specs
from qwen2audio_jax.model.layers import Params
from qwen2audio_jax.parallel.sharding import named_sharding
from qwen2audio_jax.plan.request import Shapes
from qwen2audio_jax.plan.resident import weight_specs

Stage = Literal["encode", "prefill", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)

# The published generation_config.json's values; only top_k and do_sample affect the program.
_SETTINGS = {"top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.1, "pad_token_id": 0}


@dataclass(frozen=True)
class Batch:
    """Abstract arguments of a batch's programs, on a mesh.

    Attributes:
        config: with the dtype of the computation.
        mesh: of a topology to compile for.
        shapes: the listed shapes.
        cache_dtype: of keys and values.
        attention: as `from_pretrained` takes it.
        weights: "float" or "int8": see `model.sharded_specs`.
    """

    config: Qwen2AudioConfig
    mesh: Mesh
    shapes: Shapes
    cache_dtype: str
    attention: str = AUTO
    weights: str = "float"

    def spec(self, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        """One array by its logical axes."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(self.mesh, *axes))

    @property
    def chosen_attention(self) -> str:
        """The attention implementation on the mesh's devices."""
        return choose_attention(
            self.attention, mesh=self.mesh, dtype=self.config.dtype, head_dims=self.config.head_dims
        )

    @property
    def params(self) -> Mapping[str, Any]:
        """All weights."""
        return weight_specs(self.config, mesh=self.mesh, weights=self.weights)

    @property
    def cache(self) -> KVCache:
        """The cache of all rows."""
        rows, capacity, dtype = self.shapes.rows, self.shapes.capacity, jnp.dtype(self.cache_dtype)
        return cache_specs(self.config.text_config, rows=rows, capacity=capacity, dtype=dtype, mesh=self.mesh)

    @property
    def sampler(self) -> SamplerState:
        """The sampler's state."""
        vocab = self.params["decoder"]["embed_tokens"]["embedding"].shape[0]
        rows: Any = (self.shapes.rows,)
        state: Any = {
            "seen": self.spec((*rows, vocab), jnp.bool_, "batch", "vocab"),
            "ids": self.spec((*rows, self.config.text_config.max_position_embeddings), jnp.int32, "batch", None),
            "length": self.spec(rows, jnp.int32, "batch"),
            "step": self.spec(rows, jnp.int32, "batch"),
            "seeds": self.spec(rows, jnp.uint32, "batch"),
            "finished": self.spec(rows, jnp.bool_, "batch"),
        }
        return SamplerState(**state)


def encode_beside(
    params: Params, features: jax.Array, frames: jax.Array, cache: KVCache, *, cfg: Qwen2AudioConfig, attention: str
) -> qwen2_audio.AudioFeatures:
    """`model.encode_audio` beside a cache, which it does not read."""
    return qwen2_audio.encode_audio(params, features, frames, cfg=cfg, attention=attention)


def prefill_beside(
    params: Params,
    embeddings: jax.Array,
    lengths: jax.Array,
    cache: KVCache,
    *,
    cfg: Qwen2AudioConfig,
    cache_dtype: str,
    attention: str,
) -> tuple[jax.Array, tuple[Piece, ...]]:
    """`model.prefill` beside the cache that its pieces are for."""
    return qwen2_audio.prefill(params, embeddings, lengths, cfg=cfg, cache_dtype=cache_dtype, attention=attention)


_encode = program(encode_beside, static_argnames=("cfg", "attention"), keep_unused=True)
_prefill = program(prefill_beside, static_argnames=("cfg", "cache_dtype", "attention"), keep_unused=True)
_next_step = program(
    inspect.unwrap(decoding.next_step), static_argnames="mode", donate_argnames="cache", keep_unused=True
)


def lower_encode(batch: Batch) -> jax.stages.Lowered:
    """Lower the encoder for one clip per row."""
    shapes, audio = batch.shapes, batch.config.audio_config
    features = batch.spec((shapes.clips, audio.num_mel_bins, shapes.frames), jnp.float32, "clip", "mels", "position")
    frames = batch.spec((shapes.clips,), jnp.int32, "clip")
    return _encode.lower(
        batch.params, features, frames, batch.cache, cfg=batch.config, attention=batch.chosen_attention
    )


def lower_prefill(batch: Batch) -> jax.stages.Lowered:
    """Lower the prefill of as many rows as are computed at once."""
    shapes, config = batch.shapes, batch.config
    rows = prefill_rows(shapes.rows, mesh=batch.mesh)
    return _prefill.lower(
        batch.params,
        batch.spec(
            (rows, shapes.tokens, config.text_config.hidden_size), jnp.dtype(config.dtype), "batch", "token", "width"
        ),
        batch.spec((rows,), jnp.int32, "batch"),
        batch.cache,
        cfg=config,
        cache_dtype=batch.cache_dtype,
        attention=batch.chosen_attention,
    )


def lower_decode(batch: Batch, *, mode: Mode) -> jax.stages.Lowered:
    """Lower the step that generates every token but the first, sampler and stop checks included."""
    text = batch.config.text_config
    settings = GenerationConfig.from_dict(
        {**_SETTINGS, "do_sample": mode == "sample", "eos_token_id": text.eos_token_id}
    )
    sampling = jax.eval_shape(partial(sampling_params, settings, vocab_size=text.vocab_size))
    sampling = jax.tree.map(lambda leaf: batch.spec(leaf.shape, leaf.dtype), sampling)
    tokens = batch.spec((batch.shapes.rows,), jnp.int32, "batch")
    stopped = batch.spec((batch.shapes.rows,), jnp.bool_, "batch")
    runtime = Runtime(batch.params, batch.config, batch.mesh, batch.cache_dtype, batch.chosen_attention)
    log_probs = batch.spec((batch.shapes.rows,), jnp.float32, "batch")
    last = NextToken(*cast(Any, (tokens, log_probs, batch.sampler)))
    return _next_step.lower(runtime, last, batch.cache, stopped, sampling, mode=mode)


def lower(stage: Stage, batch: Batch, *, mode: Mode) -> jax.stages.Lowered:
    """Lower a stage of a batch; `mode` is the decode step's."""
    stages: dict[Stage, Callable[[], jax.stages.Lowered]] = {
        "encode": partial(lower_encode, batch),
        "prefill": partial(lower_prefill, batch),
        "decode": partial(lower_decode, batch, mode=mode),
    }
    with jax.set_mesh(batch.mesh):
        return stages[stage]()


def stages_of(shapes: Shapes) -> tuple[Stage, ...]:
    """The stages that a batch has: without clips there is nothing to encode."""
    return STAGES if shapes.clips else STAGES[1:]

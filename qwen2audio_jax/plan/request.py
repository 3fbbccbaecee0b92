"""Planning request: a batch on a machine, and its listed shapes."""

import math
from dataclasses import dataclass

from jax.sharding import Mesh

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.padded_shapes import (
    padded_capacity,
    padded_clip_count,
    padded_frames,
    padded_row_count,
    padded_tokens,
)
from qwen2audio_jax.generation.sampling import Mode
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.model.quantization import INT8
from qwen2audio_jax.plan.resident import check_stored, compute_config, compute_dtype
from qwen2audio_jax.plan.topology import Topology, check_slices, mesh_sizes

TEXT_TOKENS = 30
"""Text tokens of a prompt about one clip: chat template and a short question."""
FRAMES_A_SECOND = 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """A batch on a machine; see `make_request`.

    Attributes:
        config: of the model; its dtype is that of the computation.
        topology: the machine.
        data: mesh axis.
        model: mesh axis.
        batch: number of rows.
        prompt_tokens: of the longest prompt, audio tokens included.
        max_new_tokens: of an answer.
        weights: dtype in which the weights are stored.
        cache: dtype in which keys and values are stored.
        mode: the sampling mode.
        num_slices: parts of the machine connected only by a slow network.
    """

    config: Qwen2AudioConfig
    topology: Topology
    data: int
    model: int
    batch: int
    prompt_tokens: int
    max_new_tokens: int
    weights: str
    cache: str
    mode: Mode
    num_slices: int

    @property
    def stored(self) -> str:
        """The `weights` argument of `model.sharded_specs`: "float" or "int8"."""
        return INT8 if self.weights == INT8 else "float"

    @property
    def clip_frames(self) -> int:
        """Mel frames of the one clip of every prompt, the longest that fits; 0: prompts without a clip."""
        tokens = min(self.prompt_tokens - TEXT_TOKENS, self.config.audio_config.max_tokens)
        return max(4 * tokens, 0)

    @property
    def clip_tokens(self) -> int:
        """Audio tokens of that clip."""
        return token_count(self.clip_frames) if self.clip_frames else 0


@dataclass(frozen=True)
class Shapes:
    """The listed shapes of a batch, as `generate` pads it.

    Attributes:
        rows: B.
        tokens: T of the prefill.
        capacity: S of the cache.
        clips: A of the encoder's call; 0 without clips.
        frames: L of the encoder's call.
    """

    rows: int
    tokens: int
    capacity: int
    clips: int
    frames: int


def shapes_of(request: Request, *, rows: int, mesh: Mesh, frames: int | None = None) -> Shapes:
    """The shapes of a batch of `rows` rows, on a mesh that may be abstract; `frames` of a clip instead of its own."""
    rows, config = padded_row_count(rows, mesh=mesh, dtype=request.config.dtype), request.config
    tokens = padded_tokens(request.prompt_tokens, config=config)
    # The last token's key and value are never read.
    capacity = padded_capacity(request.prompt_tokens + request.max_new_tokens - 1, config=config)
    frames = request.clip_frames if frames is None else frames
    clips = padded_clip_count(rows, mesh=mesh) if frames else 0
    length = padded_frames(frames, config=config.audio_config) if clips else 0
    return Shapes(rows, tokens, max(tokens, capacity), clips, length)


def make_request(
    config: Qwen2AudioConfig,
    *,
    topology: Topology,
    batch: int,
    prompt_tokens: int,
    max_new_tokens: int,
    weights: str = "bfloat16",
    cache: str = "auto",
    data: int = -1,
    model: int = 0,
    num_slices: int = 1,
    mode: Mode = "greedy",
) -> Request:
    """Make a consistent request.

    `data` and `model` are as in `topology.mesh_sizes`; a cache of "auto" has the dtype of the computation.

    Raises:
        ValueError: a number below 1, more positions than the model has, a mesh that does not fit, an unknown dtype.
    """
    for name, value in (("batch", batch), ("prompt-tokens", prompt_tokens), ("max-new-tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    if max_new_tokens > LIMITS.new_tokens:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: at most {LIMITS.new_tokens}")
    positions = config.text_config.max_position_embeddings
    if prompt_tokens + max_new_tokens > positions:
        raise ValueError(
            f"--prompt-tokens {prompt_tokens} and --max-new-tokens {max_new_tokens} make "
            f"{prompt_tokens + max_new_tokens} positions, but the model has {positions}: ask for fewer of either"
        )
    if batch > MOST_ROWS:
        raise ValueError(f"--batch {batch}: at most {MOST_ROWS}")
    cache = compute_dtype(weights) if cache == "auto" else cache
    check_stored(weights=weights, cache=cache)
    data, model = mesh_sizes(topology, config=config, data=data, model=model)
    check_slices(topology, num_slices, model=model)
    return Request(
        config=compute_config(config, weights=weights),
        topology=topology,
        data=data,
        model=model,
        batch=batch,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        weights=weights,
        cache=cache,
        mode=mode,
        num_slices=num_slices,
    )


MOST_ROWS = 1 << 16
"""Maximum rows of a planned batch."""


def clip_seconds(request: Request) -> float:
    """Seconds of the clip of every prompt."""
    return request.clip_frames / FRAMES_A_SECOND


def audio_tokens(seconds: float) -> int:
    """Audio tokens of a clip."""
    return max(int(token_count(math.ceil(seconds * FRAMES_A_SECOND))), 0)

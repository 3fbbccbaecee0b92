"""Work: a request on its way through the engine, from its checked inputs to its answer."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.engine.handle import Handle
from qwen2audio_jax.engine.prepare import Prepared
from qwen2audio_jax.engine.request import Answer, RequestError, Timings
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.guides import Guide
from qwen2audio_jax.generation.inputs import CheckedInputs, ClipFeatures, audio_slots, text_rows
from qwen2audio_jax.generation.padded_shapes import padded_frames
from qwen2audio_jax.generation.prefix import clip_digests, row_tokens, text_tokens
from qwen2audio_jax.generation.sampling_params import row_params, row_seeds
from qwen2audio_jax.generation.stopping import StopMatcher, stop_matchers
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

FRAME_SECONDS = 0.01
"""A frame of log-mel features."""


@dataclass(frozen=True)
class Bounds:
    """What every request has to fit: positions of prompt and answer together, and stop ids."""

    positions: int
    stops: int


@dataclass(eq=False)
class Work:
    """The state of one request; but for `handle`, only the engine's thread changes it once it waits.

    Attributes:
        handle: of whoever waits for it.
        config: its generation settings.
        seed: of its draws.
        submitted: when, by `time.monotonic`.
        budget: the most new tokens.
        inputs: its checked prompt and clips; None once it is prefilled.
        key: the prompt as prefixes are compared: see `prefix.row_tokens`.
        digests: a hash of each clip's content.
        audio_seconds, truncated_clips: of its answer.
        load_seconds: what preparing it took.
        began, first: when the model began with it and when its first token was read, as `submitted`; 0 before.
        slot: where its row is.
        reused: prompt tokens that were copied from another slot.
        issued: how many of its tokens have been issued; `tokens` has those that were read.
    """

    handle: Handle
    config: GenerationConfig
    seed: int
    submitted: float
    matcher: StopMatcher | None = None
    guide: Guide | None = None
    budget: int = 0
    inputs: CheckedInputs | None = None
    key: np.ndarray = field(default_factory=lambda: text_tokens(np.zeros(0, int)))
    digests: tuple[bytes, ...] = ()
    audio_seconds: float = 0.0
    truncated_clips: tuple[str, ...] = ()
    load_seconds: float = 0.0
    began: float = 0.0
    first: float = 0.0
    slot: int | None = None
    reused: int = 0
    issued: int = 0
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.key)

    @property
    def ids(self) -> np.ndarray:
        """The prompt's ids, [T] int32."""
        assert self.inputs is not None
        return self.inputs.rows.ids[0]

    def held(self) -> np.ndarray:
        """The sequence whose keys and values its row has: the prompt, and tokens that were read and appended."""
        appended = min(max(self.issued - 1, 0), len(self.tokens))
        return np.concatenate([self.key, text_tokens(np.asarray(self.tokens[:appended], np.int64))])

    def take(self, prepared: Prepared, *, config: Qwen2AudioConfig, bounds: Bounds) -> None:
        """Check the prepared inputs and keep them.

        Raises:
            ValueError: they do not fit the model or the engine.
        """
        rows = text_rows(prepared.ids, None, config=config)
        clips = _clips(prepared, config=config)
        inputs = CheckedInputs(rows, clips, audio_slots(rows, clips, config=config))
        self.budget = self.config.new_token_budget(len(rows.ids[0]))
        needed = len(rows.ids[0]) + self.budget - 1
        if needed > bounds.positions:
            raise ValueError(
                f"a prompt of {len(rows.ids[0])} tokens and {self.budget} new ones take {needed} positions, and the "
                f"engine has {bounds.positions} a slot: shorten the prompt, lower max_new_tokens, or raise positions"
            )
        [self.key] = row_tokens(inputs)
        if clips is not None:
            self.digests = tuple(row.tobytes() for row in clip_digests(clips))
        self.inputs, self.load_seconds = inputs, prepared.seconds
        self.audio_seconds = round(sum(prepared.frames) * FRAME_SECONDS, 2)
        self.truncated_clips = prepared.truncated_clips

    def answer(self, reason: str, *, decode: Callable[..., str]) -> Answer:
        """The answer of what has been read."""
        now = time.monotonic()
        return Answer(
            id=self.handle.request.id,
            text=decode(self.tokens, skip_special_tokens=True),
            token_ids=np.asarray(self.tokens, np.int32),
            log_probs=np.asarray(self.log_probs, np.float32),
            finish_reason=reason,
            prompt_tokens=self.length,
            audio_tokens=int((self.key[:, 0] < 0).sum()),
            reused_tokens=self.reused,
            audio_seconds=self.audio_seconds,
            truncated_clips=self.truncated_clips,
            seconds=Timings(
                load=self.load_seconds,
                queued=(self.began or now) - self.submitted,
                first_token=(self.first or now) - self.submitted,
                total=now - self.submitted,
            ),
        )


def make_work(
    handle: Handle, *, defaults: GenerationConfig, processor: Qwen2AudioProcessor, bounds: Bounds, vocab_size: int
) -> Work:
    """The work of a request, its options checked.

    Raises:
        RequestError: an option cannot be used.
    """
    request = handle.request
    try:
        config = defaults.updated(**request.options)
        if config.num_return_sequences != 1:
            raise ValueError(
                "num_return_sequences must be 1: submit a request for each answer, with seeds of their own"
            )
        row_params([config], rows=1, stops=bounds.stops, vocab_size=vocab_size)
        matchers = stop_matchers(config.stop_strings, processor, rows=1)
        [seed] = row_seeds(request.seed, rows=1)
    except (TypeError, ValueError) as error:
        raise RequestError(f"options: {error}", kind="input") from None
    return Work(handle, config, int(seed), time.monotonic(), matcher=matchers[0] if matchers else None)


def _clips(prepared: Prepared, *, config: Qwen2AudioConfig) -> ClipFeatures | None:
    if not prepared.frames:
        return None
    audio = config.audio_config
    for features in prepared.features:
        if len(features) != audio.num_mel_bins:
            raise ValueError(f"a clip has {len(features)} mels, this model {audio.num_mel_bins}: use its processor")
    clips = list(zip(prepared.features, prepared.frames, strict=True))
    return side_by_side(clips, width=padded_frames(max(prepared.frames), config=audio))


def side_by_side(clips: Sequence[tuple[np.ndarray, int]], *, width: int) -> ClipFeatures:
    """Clips (features [M, L], valid frames) as one array, padded with zeros, which the encoder ignores."""
    together = np.zeros((len(clips), len(clips[0][0]), width), np.float32)
    for row, (features, _) in zip(together, clips, strict=True):
        row[:, : features.shape[1]] = features
    return ClipFeatures(together, np.asarray([frames for _, frames in clips], np.int32))

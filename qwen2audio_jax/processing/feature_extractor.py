"""Feature extractor: clips to the encoder's log-mel features, with the checkpoint's preprocessor settings."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen2audio_jax.audio import AudioError, load_audio, log_mel
from qwen2audio_jax.audio.load import LoadedClip, load_clip
from qwen2audio_jax.audio.mel import mel_filters
from qwen2audio_jax.config.frozen import refuses_assignment
from qwen2audio_jax.config.strict_json import describe, present, read_json_object
from qwen2audio_jax.config.unknown_keys import could_matter
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.limits import LIMITS, Limits
from qwen2audio_jax.processing.collate import CLIPS, clips_of, gathered
from qwen2audio_jax.processing.files import read_extractor_settings
from qwen2audio_jax.processing.output import ProcessorOutput, to_output
from qwen2audio_jax.processing.placeholders import is_clip
from qwen2audio_jax.storage.bucket import PathOrUrl
from qwen2audio_jax.storage.write_whole import write_whole
from qwen2audio_jax.torch_style.attributes import EXTRACTOR, no_attribute
from qwen2audio_jax.torch_style.extractor_options import check_extractor_options
from qwen2audio_jax.torch_style.loading_options import take_saving_options

FIXED: Mapping[str, tuple[Any, ...]] = {
    "sampling_rate": (16_000,),
    "hop_length": (160,),
    "n_fft": (400,),
    "padding_value": (0.0,),
    "padding_side": ("right",),
    "dither": (0.0, None),
    "do_normalize": (False, None),
    "feature_extractor_type": ("WhisperFeatureExtractor",),
}
"""Settings that change the features and are supported only with these values."""

INERT = frozenset(
    (
        "return_attention_mask",
        "processor_class",
        "mel_filters",
        "auto_map",
        "transformers_version",
        "_commit_hash",
        "_name_or_path",
    )
)
"""Keys that some release of transformers writes and that change no feature."""


KNOWN = frozenset((*FIXED, "feature_size", "chunk_length", "n_samples", "nb_max_frames"))
FRONT_END = re.compile(
    r"audio(?!_processor)|center|channel|chunk|clip|dither|duration|emphasis|energy|fft|filter|fmax|fmin|frame|freq|gain|hop|length"
    r"|log|max|mean|mel|min|mono|normali|pad_|padding|patch|power|rate|resampl|samp|scal|second|silence|size|spec|std"
    r"|stride|trim|trunc|window"
)
"""Words of settings that change what some front end hears."""


class Heard(NamedTuple):
    """A clip as the encoder takes it.

    Attributes:
        features: [M, L] float32.
        frames: how many of them are sound.
        missing: what shows that the clip's file holds less than it says; None where nothing does.
    """

    features: np.ndarray
    frames: int
    missing: str | None


@refuses_assignment(
    "the model hears what it was trained on; load_audio(samples, sampling_rate=rate) resamples, and truncation=True "
    "cuts long clips"
)
@dataclass(frozen=True, init=False)
class Qwen2AudioFeatureExtractor:
    """Log-mel feature extractor, which pads every clip with silence to the encoder's longest input.

    Source: `transformers.WhisperFeatureExtractor` with the settings that Qwen2-Audio publishes.

    Attributes:
        feature_size: mel filters M.
        chunk_length: seconds of the longest clip.
        sampling_rate, hop_length, n_fft: samples a second, samples a frame, samples a window: fixed.
        n_samples, nb_max_frames: the longest clip in samples and in frames L.
        padding_value, padding_side, return_attention_mask: silence, behind the clip, and a mask always.
    """

    feature_size: int = 80
    chunk_length: float = 30
    sampling_rate: int = 16_000
    hop_length: int = 160
    n_fft: int = 400
    # No fields, as nothing else is supported.
    padding_value, padding_side, return_attention_mask = 0.0, "right", True

    def __init__(self, **settings: Any):
        """Make one of settings under the names of preprocessor_config.json.

        Raises:
            TypeError: there is no such setting.
            ValueError: as for `from_dict`.
        """
        for name in settings:
            if name not in KNOWN and name not in INERT:
                known = ", ".join(sorted(KNOWN))
                raise TypeError(f"the feature extractor has no setting {name!r}; there are {known}")
        judged = _judged(settings)
        for field in fields(self):
            object.__setattr__(self, field.name, judged.get(field.name, field.default))
        self._check_stated(judged)

    def __getattr__(self, name: str) -> Any:
        """Nothing; the error names what to use instead of a method of transformers'."""
        raise no_attribute("feature extractor", name, EXTRACTOR)

    @classmethod
    def from_pretrained(
        cls, source: PathOrUrl = EMBEDDED, *, revision: str | None = None
    ) -> "Qwen2AudioFeatureExtractor":
        """Read a checkpoint's settings: of a folder, a URL, a hub id or the embedded model.

        Raises:
            ValueError: there are none, or settings that are not supported.
        """
        # Imported here: making an extractor needs none of the modules that fetch checkpoints.
        from qwen2audio_jax.source import resolve_processor_files

        return cls.from_dict(read_extractor_settings(resolve_processor_files(source, revision=revision)))

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> "Qwen2AudioFeatureExtractor":
        """Read a file as `to_json_file` writes it; errors as for `from_dict`."""
        return cls.from_dict(read_json_object(Path(path)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Qwen2AudioFeatureExtractor":
        """Read preprocessor_config.json, or the `feature_extractor` of processor_config.json.

        Raises:
            ValueError: a setting is unknown, has a value that is not supported, or contradicts another.
        """
        return cls(**_judged(settings))

    def _check_stated(self, judged: Mapping[str, Any]) -> None:
        """Raise a ValueError for a length beyond the limits, or lengths that contradict each other."""
        if self.chunk_length > LIMITS.clip_seconds:
            raise ValueError(
                f"preprocessor setting chunk_length is {self.chunk_length} s; at most {LIMITS.clip_seconds:g} s"
            )
        for key in ("n_samples", "nb_max_frames"):
            if key in judged and judged[key] != getattr(self, key):
                raise ValueError(
                    f"preprocessor setting {key} is {judged[key]}, but chunk_length {self.chunk_length} s at "
                    f"{self.sampling_rate} Hz makes {getattr(self, key)}; make them agree"
                )

    def to_dict(self) -> dict[str, Any]:
        """The settings as preprocessor_config.json holds them; transformers reads them back."""
        return {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": self.feature_size,
            "chunk_length": self.chunk_length,
            "sampling_rate": self.sampling_rate,
            "hop_length": self.hop_length,
            "n_fft": self.n_fft,
            "n_samples": self.n_samples,
            "nb_max_frames": self.nb_max_frames,
            "padding_side": "right",
            "padding_value": 0.0,
            "dither": 0.0,
            "return_attention_mask": True,
            "processor_class": "Qwen2AudioProcessor",
        }

    def to_json_string(self) -> str:
        """The settings as the text of preprocessor_config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write that text to a file, whole or not at all."""
        write_whole(Path(path), self.to_json_string().encode())

    def save_pretrained(self, folder: str | os.PathLike[str], **words: Any) -> list[str]:
        """Write preprocessor_config.json into a folder, which is made if it is missing; the file's path.

        `words`: of the reference, at values that change nothing, as push_to_hub=False.
        """
        take_saving_options(words)
        path = Path(folder, "preprocessor_config.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.to_json_file(path)
        return [str(path)]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the arrays that a call returns."""
        return list(CLIPS)

    @property
    def mel_filters(self) -> np.ndarray:
        """The mel filters [201, M] float64: M of them over the frequencies of a window."""
        return mel_filters(self.feature_size)

    @property
    def n_samples(self) -> int:
        """Samples of the longest clip."""
        return round(self.chunk_length * self.sampling_rate)

    @property
    def nb_max_frames(self) -> int:
        """Frames L of the longest clip, the length of all features."""
        return self.n_samples // self.hop_length

    @property
    def limits(self) -> Limits:
        """The table of limits, with the longest clip that these settings allow."""
        return replace(LIMITS, clip_seconds=self.n_samples / self.sampling_rate)

    def load(self, source: Any, **options: Any) -> np.ndarray:
        """Load one clip from any source as samples [n] float32 at 16 kHz, no longer than `n_samples`.

        Args:
            source: as for `load_audio`.
            **options: of `load_audio`: truncation, allow_truncated, track, allow_private_urls.
        """
        return load_audio(source, limits=self.limits, **options)

    def load_clip(self, source: Any, **options: Any) -> LoadedClip:
        """The same, with what is known to be missing of it."""
        return load_clip(source, limits=self.limits, **options)

    def __call__(
        self,
        clips: Sequence[Any] | np.ndarray | None = None,
        *,
        raw_speech: Any = None,
        sampling_rate: int | None = None,
        truncation: bool = False,
        allow_truncated: bool = False,
        track: int | None = None,
        return_tensors: str | None = None,
        **words: Any,
    ) -> ProcessorOutput:
        """Features of one clip or several.

        Args:
            clips: a clip, as an array [n] of samples at 16 kHz, or a list of whatever `load_audio` takes.
            raw_speech: another name of it, the reference's.
            sampling_rate: samples per second of the arrays; if stated, it must be 16000.
            truncation: keep the beginning of a clip that is too long instead of refusing it.
            allow_truncated: hear files that are shorter than they say, as far as they go, instead of refusing them.
            track: number, from 0, of the audio track of files that have several.
            return_tensors: None or "np" for numpy, "jax" for JAX arrays.
            **words: of the reference, at values that say what is done here anyway: padding="max_length", as every clip
                is padded to the longest there may be, return_attention_mask=True, do_normalize=False, device.

        Returns:
            input_features [A, M, L] float32 and feature_attention_mask [A, L] int32.

        Raises:
            AudioError: a clip is refused; see there.
            ValueError: another value of `return_tensors`, or of one of those words.
            TypeError: an unknown argument, or no clip.
        """
        check_extractor_options(words)
        if (clips is None) == (raw_speech is None):
            raise TypeError("pass the clip or a list of clips, once: clips= and raw_speech= are the same argument")
        clips = raw_speech if clips is None else clips
        self.check_sampling_rate(sampling_rate)
        if is_clip(clips) and not isinstance(clips, Iterator) and getattr(clips, "ndim", 1) == 1:
            clips = [clips]
        options = {"truncation": truncation, "allow_truncated": allow_truncated, "track": track}
        heard = [self.hear(clip, **options) for clip in clips]
        missing = tuple(f"clips[{i}]: {clip.missing}" for i, clip in enumerate(heard) if clip.missing is not None)
        return to_output(self.stack(heard), return_tensors=return_tensors, truncated_clips=missing)

    def pad(self, processed_features: Any, *, return_tensors: str | None = None, **words: Any) -> ProcessorOutput:
        """Features of several calls put together. Every clip has the same length already, so nothing is added.

        Args:
            processed_features: a list of mappings with input_features, [M, L] or [A, M, L] each, and perhaps
                feature_attention_mask (or attention_mask), [L] or [A, L]; or one mapping of such lists.
            return_tensors: None or "np" for numpy, "jax" for JAX arrays.
            **words: of the reference, as for a call.

        Returns:
            input_features [A, M, L] float32, and feature_attention_mask [A, L] int32 if masks are given.

        Raises:
            ValueError: another shape, as that of samples, or a word that would change something.
            TypeError: an unknown argument.
        """
        if words.pop("truncation", None):
            raise ValueError("truncation=True is not supported: features have one length; cut samples before the call")
        check_extractor_options(words, padded=True)
        columns = gathered(processed_features, known=(*CLIPS, "attention_mask"), needed="input_features")
        found = clips_of(columns, mels=self.feature_size, frames=self.nb_max_frames)
        return to_output(found, return_tensors=return_tensors)

    def hear(self, source: Any, **options: Any) -> Heard:
        """Load one clip from any source, with options of `load`, and compute its features."""
        clip = self.load_clip(source, **options)
        features, frames = log_mel(clip.samples, num_mel_bins=self.feature_size, max_frames=self.nb_max_frames)
        return Heard(features, frames, clip.missing)

    def stack(self, heard: Sequence[Heard]) -> dict[str, np.ndarray]:
        """The two feature arrays of clips that are heard already."""
        features = np.zeros((len(heard), self.feature_size, self.nb_max_frames), np.float32)
        frames = np.array([clip.frames for clip in heard], np.int32)
        for row, clip in zip(features, heard, strict=True):
            row[:] = clip.features
        mask = np.arange(self.nb_max_frames) < frames[:, None]
        return {"input_features": features, "feature_attention_mask": mask.astype(np.int32)}

    def check_sampling_rate(self, sampling_rate: int | None) -> None:
        """Raise AudioError "rate" if arrays are stated to have a sampling rate other than the model's."""
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(
                f"sampling_rate={sampling_rate!r}, but the model hears {self.sampling_rate} samples a second: pass the "
                f"file's path instead, or resample the array with qwen2audio_jax.load_audio(samples, "
                f"sampling_rate={sampling_rate!r})",
                kind="rate",
            )


def _judged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say anything, checked one by one."""
    values: dict[str, Any] = {}
    for key, value in present(settings).items():
        if key in FIXED:
            if not any(value == supported and value is not True for supported in FIXED[key]):
                raise ValueError(
                    f"preprocessor setting {key} is {describe(value)}, which is not supported; supported: "
                    f"{describe(FIXED[key][0])}. A model trained with another value would hear something else"
                )
        elif key in ("feature_size", "chunk_length", "n_samples", "nb_max_frames"):
            kinds = int | float if key == "chunk_length" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= 10_000_000:
                raise ValueError(f"preprocessor setting {key} is {describe(value)}; it must be a number above 0")
            values[key] = value
        elif key == "num_mel_bins" and value == settings.get("feature_size"):
            continue  # the encoder's name of it
        elif key not in INERT and could_matter(key, value, known=KNOWN, words=FRONT_END):
            raise ValueError(
                f"preprocessor setting {key} is {describe(value)}: this key is not known, so its effect on the "
                f"features is not either. Check its spelling; delete it if it changes nothing"
            )
    return values

"""The standalone audio encoder: audio features without the 7 B decoder in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2audio_jax.checkpoint.compilation_cache import use_compilation_cache
from qwen2audio_jax.checkpoint.reader import restore_params
from qwen2audio_jax.config import Qwen2AudioEncoderConfig
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.generation.encoding import encode
from qwen2audio_jax.generation.inputs import ClipFeatures, check_clips, clips_to_mesh
from qwen2audio_jax.model.attention import check_attention, choose_attention
from qwen2audio_jax.model.qwen2_audio import sharded_specs
from qwen2audio_jax.parallel.process_rows import Prepared, agree, own_arrays
from qwen2audio_jax.parallel.sharding import single_device_mesh
from qwen2audio_jax.source import load_config
from qwen2audio_jax.storage.bucket import PathOrUrl


@dataclass(frozen=True)
class EncoderOutput:
    """The encoder's output.

    Attributes:
        last_hidden_state: [A, W, D], one vector for 40 ms, cut to the longest clip; vectors past a clip's own length
            are meaningless.
        lengths: [A] int32, valid vectors of each clip.
    """

    last_hidden_state: jax.Array
    lengths: jax.Array


class Qwen2AudioEncoder:
    """The audio tower of a Qwen2-Audio checkpoint, without projector and decoder.

    Attributes:
        config: `Qwen2AudioEncoderConfig`.
        params: its weights, a nested dict of `jax.Array`s.
        mesh: the devices; clips are split over all of them.
        dtype: compute dtype.
        attention: its implementation: "xla", "cudnn" or "pallas".

    Source: `Qwen2AudioEncoder`.
    """

    def __init__(
        self,
        config: Qwen2AudioEncoderConfig,
        params: Mapping[str, Any],
        *,
        dtype: str,
        mesh: Mesh | None = None,
        attention: str = "auto",
    ):
        """Wrap weights; see `from_pretrained`."""
        self.config = config
        self.params = params
        self.dtype = dtype
        self.mesh = single_device_mesh() if mesh is None else mesh
        self.attention = choose_attention(attention, mesh=self.mesh, dtype=dtype, head_dims=(config.head_dim,))

    @classmethod
    def from_pretrained(
        cls,
        source: PathOrUrl = EMBEDDED,
        *,
        dtype: str = "auto",
        mesh: Mesh | None = None,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        attention: str = "auto",
    ) -> "Qwen2AudioEncoder":
        """Load only the encoder's weights; arguments and errors as `Qwen2AudioForConditionalGeneration`'s."""
        mesh = single_device_mesh() if mesh is None else mesh
        check_attention(attention, mesh=mesh)
        use_compilation_cache()
        path, config = load_config(source, dtype=dtype, revision=revision, cache_dir=cache_dir)
        specs = {"encoder": sharded_specs(config, mesh=mesh)["encoder"]}
        params = restore_params(path, specs=specs)["encoder"]
        return cls(config.audio_config, params, dtype=config.dtype, mesh=mesh, attention=attention)

    def __call__(self, input_features: Any, feature_attention_mask: Any) -> EncoderOutput:
        """Encode clips, each at its true length.

        Args:
            input_features: [A, M, max_frames] log-mel.
            feature_attention_mask: [A, max_frames] of 0 and 1.

        Raises:
            ValueError: shapes that do not fit, a clip without an audio token, NaN or Inf.
        """

        def check() -> tuple[ClipFeatures, Prepared]:
            clips = check_clips(input_features, feature_attention_mask, config=self.config)
            return clips, Prepared(clips.sizes, inputs=(clips.frames, clips.features))

        clips, sizes = agree(self.mesh, check)
        features, frames = clips_to_mesh(clips, config=self.config, mesh=self.mesh, sizes=sizes)
        with jax.set_mesh(self.mesh):
            encoded = encode(self.params, features, frames, cfg=self.config, dtype=self.dtype, attention=self.attention)
        encoded = own_arrays(self.mesh, encoded)
        return EncoderOutput(encoded[: len(clips.frames), : int(clips.tokens.max())], jax.numpy.asarray(clips.tokens))

"""The model object: weights on a mesh, a configuration, and the public calls.

It holds all the state of the package. This module checks, pads and keeps books on the host; the arithmetic is in
`model`, the way of a call from inputs to tokens in `generation.run`.
"""

import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qwen2audio_jax.checkpoint.adapter import find_adapter, load_adapter
from qwen2audio_jax.checkpoint.compilation_cache import use_compilation_cache
from qwen2audio_jax.checkpoint.save_model import save_model
from qwen2audio_jax.checkpoint.weights import check_storage, load_weights
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.generation.arguments import INPUTS, Arguments
from qwen2audio_jax.generation.call import check_memory, check_one_row, prepare_call
from qwen2audio_jax.generation.decoding import Progress
from qwen2audio_jax.generation.default_options import default_generation, read_generation
from qwen2audio_jax.generation.forward import encode_call, forward_call, forward_inputs
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.outputs import ModelOutput, collect, pieces
from qwen2audio_jax.generation.run import steps
from qwen2audio_jax.generation.runtime import Runtime
from qwen2audio_jax.generation.session import Session
from qwen2audio_jax.generation.stopping import Tokenizer
from qwen2audio_jax.generation.streamers import ended, fed
from qwen2audio_jax.generation.text_stream import TextStream
from qwen2audio_jax.generation.warmup import OnProgress, make_bounds, warm_up
from qwen2audio_jax.model.attention import check_attention, choose_attention
from qwen2audio_jax.model.kernel_layout import prefers_turned, turn_in_place
from qwen2audio_jax.model.qwen2_audio import AudioFeatures, parameter_specs
from qwen2audio_jax.parallel.process_rows import share_of
from qwen2audio_jax.parallel.sharding import check_mesh, single_device_mesh
from qwen2audio_jax.processing.end_of_turn import warn_of_missing_stop
from qwen2audio_jax.source import load_config, resolve_processor_files
from qwen2audio_jax.storage.bucket import PathOrUrl
from qwen2audio_jax.torch_style.loading_options import dtype_name, take_loading_options, take_saving_options
from qwen2audio_jax.torch_style.modules import ModuleMethods

Source = PathOrUrl

LOADING_OPTIONS = (
    "dtype",
    "mesh",
    "revision",
    "cache_dir",
    "adapter",
    "weights_dtype",
    "cache_dtype",
    "attention",
    "torch_dtype",
)
ATTRIBUTES = ("config", "params", "mesh", "generation_config", "cache_dtype", "attention")


class Qwen2AudioForConditionalGeneration(ModuleMethods):
    """Qwen2-Audio with its language-model head.

    Attributes:
        config: `Qwen2AudioConfig`; its `dtype` is the compute dtype.
        params: the weights, a nested dict of `jax.Array`s on `mesh`, the same tree as the checkpoint's; on some
            CPUs kernels of bfloat16 models are turned when they are loaded (`model.kernel_layout`).
        mesh: the devices, with axes `data` and `model`.
        generation_config: the defaults of `generate`.
        cache_dtype: storage of keys and values in `generate`: "auto" (the compute dtype) or "int8".
        attention: implementation for whole prompts and clips: "xla", "cudnn" or "pallas".
    """

    def __init__(
        self,
        config: Qwen2AudioConfig,
        params: Mapping[str, Any],
        *,
        mesh: Mesh | None = None,
        generation_config: GenerationConfig | None = None,
        cache_dtype: str = "auto",
        attention: str = "auto",
    ):
        """Wrap weights that are already laid out as `model.sharded_specs(config, mesh=mesh)`; see `from_pretrained`."""
        check_storage(weights="auto", cache=cache_dtype)
        self.config = config
        self.params = params
        self.mesh = single_device_mesh() if mesh is None else mesh
        check_mesh(self.mesh, config=config)
        self.generation_config = GenerationConfig() if generation_config is None else generation_config
        self.cache_dtype = cache_dtype
        self.attention = choose_attention(attention, mesh=self.mesh, dtype=config.dtype, head_dims=config.head_dims)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute of those above; an AttributeError names what to use for others."""
        if name not in ATTRIBUTES:
            raise AttributeError(
                f"the model's {name} cannot be assigned; pass options of generation to generate or to "
                "model.generation_config.updated, those of loading (dtype=, mesh=) to from_pretrained"
            )
        if name == "generation_config" and not isinstance(value, GenerationConfig):
            raise TypeError(
                f"generation_config is a {type(value).__name__}; make one with GenerationConfig.from_dict(...) or "
                "model.generation_config.updated(...)"
            )
        object.__setattr__(self, name, value)

    @classmethod
    def from_pretrained(
        cls,
        source: Source = EMBEDDED,
        *,
        dtype: Any = "auto",
        mesh: Mesh | None = None,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        adapter: Source | None = None,
        weights_dtype: str = "auto",
        cache_dtype: str = "auto",
        attention: str = "auto",
        torch_dtype: Any = None,
        **words: Any,
    ) -> "Qwen2AudioForConditionalGeneration":
        """Load a checkpoint.

        Args:
            source: a converted (Orbax) checkpoint; or a Hugging Face directory of safetensors or a hub id, which is
                converted once into a cache folder and loaded from there afterwards; or the URL of either directory in a
                bucket (extra: `buckets`): a converted one on gs:// is read in place, others are copied or converted
                into that folder once; default: the small model that comes with the package (see
                `qwen2audio_jax.embedded`), likewise converted once.
            dtype: of the computation, and of weights that are not int8: "auto" (as stored), "float32", "bfloat16" or
                "float16", or such a dtype of torch, numpy or JAX.
            mesh: from `make_mesh`; default: the first device alone.
            revision: branch, tag or commit of a hub id.
            cache_dir: where conversions are kept; default: $QWEN2AUDIO_CACHE or ~/.cache/qwen2audio_jax.
            adapter: a LoRA adapter in PEFT's format (folder, URL or hub id) that is added to the weights; the sum is
                rounded to their dtype.
            weights_dtype: "auto" (int8 if the checkpoint was converted to int8) or "int8": the decoder's weights,
                embedding and head are quantised while they are read; see `qwen2audio_jax.model.quantization`.
            cache_dtype: "auto" (the cache of `generate` has the compute dtype) or "int8", half the size of bfloat16.
            attention: "auto" (the flash kernel of the mesh's devices, where they have one for the dtype; always plain
                XLA for float32), "xla", "cudnn" (NVIDIA GPUs) or "pallas" (TPUs). It applies to whole prompts and
                clips: one token against the cache is plain XLA.
            torch_dtype: another name of `dtype`.
            **words: options of transformers' `from_pretrained`: those without effect here (device_map,
                attn_implementation, trust_remote_code, ...) are taken, others name what to write instead.

        Raises:
            TypeError: an unknown option.
            ValueError: no checkpoint there, one that is incomplete or does not fit its configuration, an unknown dtype,
                a mesh that the model does not divide over, an attention that its devices or the dtype do not have,
                or an adapter that is not supported or does not fit, or comes with a checkpoint that is int8 already.
        """
        take_loading_options(words, known=LOADING_OPTIONS)
        dtype = dtype_name(dtype, torch_dtype)
        weights_dtype, cache_dtype, attention = (value or "auto" for value in (weights_dtype, cache_dtype, attention))
        check_storage(weights=weights_dtype, cache=cache_dtype)
        mesh = single_device_mesh() if mesh is None else mesh
        check_attention(attention, mesh=mesh)
        use_compilation_cache()
        # First, and in the user's own file: an error must not wait for a conversion of the weights.
        read_generation(resolve_processor_files(source, revision=revision))
        folder = None if adapter is None else find_adapter(adapter)
        path, config = load_config(source, dtype=dtype, revision=revision, cache_dir=cache_dir)
        check_mesh(mesh, config=config)
        defaults = default_generation(path, config=config)
        if isinstance(path, Path):  # elsewhere the processor's files would be downloaded for it
            warn_of_missing_stop(path, stops=defaults.eos_token_id, source=source)
        addition = None if folder is None else load_adapter(folder, config=config)
        params = load_weights(path, config=config, mesh=mesh, weights=weights_dtype, adapter=addition)
        if prefers_turned(mesh, dtype=config.dtype):
            params = turn_in_place(params)
        return cls(config, params, mesh=mesh, generation_config=defaults, cache_dtype=cache_dtype, attention=attention)

    def __call__(
        self,
        inputs: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        input_features: Any = None,
        feature_attention_mask: Any = None,
        labels: Any = None,
        **words: Any,
    ) -> ModelOutput:
        """Logits at every position, and the loss when labels are given.

        On a mesh over several processes every process calls this with its own rows, and gets its result on its first
        device; the loss is that of its own rows. The same holds for `encode_audio` and `generate`.

        Args:
            inputs: what the processor returned, instead of the four below, or input_ids alone.
            input_ids: [B, T] ints, with one <|AUDIO|> for every audio vector, as the processor returns them.
            attention_mask: [B, T] of 0 (padding, on either side) and 1.
            input_features: [A, M, max_frames] log-mel, the clips of all rows in order.
            feature_attention_mask: [A, max_frames] of 0 and 1.
            labels: [B, T] ints; positions with `config.ignore_index` (-100) do not count, nor does a row's first token
                (the reference counts it in left-padded rows). See `next_token_loss`.
            **words: use_cache and return_dict, without effect, as transformers' callers write them.

        Raises:
            TypeError: no input_ids, or an unknown argument.
            ValueError: inputs that do not fit each other or the model.

        Source: `Qwen2AudioForConditionalGeneration.forward`.
        """
        arrays = (input_ids, attention_mask, input_features, feature_attention_mask)
        given = forward_inputs(inputs, {**dict(zip(INPUTS, arrays, strict=True)), "labels": labels, **words})
        return forward_call(self.runtime, given)

    def encode_audio(self, input_features: Any, feature_attention_mask: Any) -> AudioFeatures:
        """Encode clips, each at its true length.

        Args:
            input_features: [A, M, max_frames] log-mel.
            feature_attention_mask: [A, max_frames] of 0 and 1.

        Returns:
            Vectors before and after the projector, cut to the longest clip: [A, W, D]; those past a clip's own length
            are meaningless.
        """
        return encode_call(self.runtime, input_features, feature_attention_mask)

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
        """Continue prompts.

        A row's tokens are its own: they do not depend on what else is in the batch, on which side it is padded, or on
        the mesh (greedy: in float32; sampled: also on nothing but its seed).

        Args:
            inputs: what the processor returned, instead of the four below (`generate(**inputs)` is the same), or
                input_ids alone.
            input_ids: [B, T] ints.
            attention_mask: [B, T] of 0 (padding, on either side) and 1.
            input_features: [A, M, max_frames] log-mel, the clips of all rows in order.
            feature_attention_mask: [A, max_frames] of 0 and 1.
            seed: for sampling: one int a returned row, or one int s that gives row i the seed s + i; None draws one.
            tokenizer: the processor or its tokenizer; needed for `stop_strings` alone.
            logits_processor: pure functions (ids [B, P] int32, -1 behind a row's tokens; scores [B, V] float32) ->
                scores, one or a list, in jax.numpy: they are compiled into the step, after the penalties and before
                temperature and filters. Another function is another program.
            stopping_criteria: functions (ids [B, T + n], None) -> bool, or [B] bool, one or a list, called on the host
                after each token with the prompts as given and what has been generated.
            streamer: a `TextIteratorStreamer` or `TextStreamer`, or another object with `put` and `end`.
            return_dict_in_generate: return a `GenerateOutput` instead of the ids alone.
            **options: any field of `GenerationConfig`, or `generation_config=` with several of them; the defaults are
                `self.generation_config`.

        Returns:
            [B * num_return_sequences, T + new] int32, each prompt as given followed by its new tokens and, after its
            end, padding; or a `GenerateOutput`.

        Raises:
            TypeError: an unknown option, or no input_ids.
            ValueError: an option of the reference that is not supported, a value out of range, inputs that do not fit,
                or prompt and new tokens together beyond the model's positions or the devices' memory.

        Source: `GenerationMixin.generate`. Padding never counts for the repetition penalty; in the reference padding
        on the right does (before transformers 5, on the left too).
        """
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
        runtime = self.runtime
        with ended(streamer):
            call = prepare_call(runtime, arguments, defaults=self.generation_config)
            check_memory(runtime, call)
            progress = Progress.of(runtime, call)
            running = fed(steps(runtime, call, progress), streamer, prompts=call.ends.prompts)
            output = collect(running, call, progress)
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
        """Continue one prompt, yielding its text incrementally; never half a UTF-8 character.

        Arguments are those of `generate`, for a single row. The joined pieces equal `tokenizer.decode` of the new
        tokens. All checks are done before this returns; leaving the loop early ends the generation. The generator's
        return value is the finish reason, as in `GenerateOutput`.

        Raises:
            TypeError, ValueError: as `generate`; also for more than one row or returned sequence.
        """
        if not share_of(self.mesh).alone:
            raise ValueError("stream runs in one process, and this model's mesh spans several: use generate")
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
        runtime = self.runtime
        call = prepare_call(runtime, arguments, defaults=self.generation_config)
        check_one_row(call)
        check_memory(runtime, call)
        progress = Progress.of(runtime, call)
        text = TextStream(partial(tokenizer.decode, skip_special_tokens=skip_special_tokens))
        return pieces(steps(runtime, call, progress), call, progress, text=text)

    def warmup(
        self,
        *,
        tokens: int,
        max_new_tokens: int,
        rows: int = 1,
        seconds: float = 30.0,
        clips: int | None = None,
        do_sample: bool | None = None,
        top_k: int | Sequence[int] | None = None,
        on_progress: OnProgress | None = None,
        threads: int | None = None,
    ) -> list[str]:
        """Compile ahead what `generate` and `stream` run within bounds, so that no such call compiles anything.

        Whatever the lengths within the bounds, the number of rows, and the options: temperature, top-p, penalties,
        seeds, up to eight stop ids, stop strings. Nothing is computed, and no device memory is taken but for the
        programs. What sessions add (`Session` extends prompts that it holds) and constrained answers are compiled
        when they are first used.

        Args:
            tokens: of the longest prompt, its audio tokens included (25 a second).
            max_new_tokens: the most new tokens of a call.
            rows: the most rows that a call returns: prompts times `num_return_sequences`.
            seconds: of the longest clip; 0 for text alone.
            clips: the most clips of a call, of all its rows; default: one a row.
            do_sample: whether calls sample; None: some do, and some do not.
            top_k: the values of top_k that calls sample with (0: all tokens); default: `generation_config`'s. Those up
                to 64 share their programs, and so do those from there to 128, and so on.
            on_progress: called after each shape with how many are done, how many there are, the seconds since the
                start and the shape's name; default: a line on stderr every ten seconds and at the end.
            threads: programs that are compiled at a time; default: one a processor core.

        Returns:
            The shapes that were compiled for, in words; each has a few programs.

        Raises:
            ValueError: a bound out of range, more programs than JAX keeps, or a mesh over several processes.
        """
        bounds = make_bounds(
            self.runtime,
            self.generation_config,
            rows=rows,
            clips=clips,
            seconds=seconds,
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            top_k=top_k,
        )
        return warm_up(self.runtime, bounds, on_progress=on_progress, threads=threads)

    def session(self, **inputs: Any) -> Session:
        """A session, which keeps the keys and values of a prompt for the next call; see `Session`.

        Args:
            **inputs: input_ids and so on, as for `generate`: one prompt, or the common prefix of later prompts, which
                is prefilled at once. Without inputs the session is empty until its first call.

        Raises:
            ValueError: as `Session.read`; or the mesh spans several processes.
        """
        session = Session(self.runtime, generation_config=self.generation_config)
        if inputs:
            session.read(**inputs)
        return session

    def num_parameters(self) -> int:
        """The number of weights, without what pads the vocabulary on a mesh."""
        return sum(spec.size for spec in jax.tree.leaves(parameter_specs(self.config)))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        **words: Any,
    ) -> None:
        """Write the model as a Hugging Face folder of safetensors, which transformers loads too.

        Args:
            folder: may hold the processor's files already, but no checkpoint.
            max_shard_size: bytes of a file at most, or a text such as "5GB".
            safe_serialization: True: there is no other format.
            **words: of transformers, at values that change nothing, as push_to_hub=False.

        Raises:
            TypeError: an unknown option.
            ValueError: weights that are int8, a mesh over several processes, a checkpoint in the folder, or no room.
        """
        take_saving_options(words)
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: weights are written as safetensors alone")
        save_model(
            folder,
            params=self.params,
            config=self.config,
            generation_config=self.generation_config,
            mesh=self.mesh,
            max_shard_size=max_shard_size,
        )

    def start(self, **inputs: Any) -> Session:
        """`session` under its former name."""
        warnings.warn("model.start is deprecated: it is called model.session now", DeprecationWarning, stacklevel=2)
        return self.session(**inputs)

    @property
    def runtime(self) -> Runtime:
        """Weights, configuration, mesh, cache dtype and attention, as the functions of `generation` take them."""
        cache_dtype = self.config.dtype if self.cache_dtype == "auto" else self.cache_dtype
        return Runtime(self.params, self.config, self.mesh, cache_dtype, self.attention)

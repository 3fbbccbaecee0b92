"""`LLM` and `SamplingParams` of vLLM over the engine: many prompts or chats with sound, answered together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.engine import Answer, Engine, Request
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

MAX_TOKENS = 16
"""vLLM's default."""

# Option of vLLM's LLM -> why it changes nothing here.
_INERT = {
    "disable_log_stats", "disable_mm_preprocessor_cache", "enable_prefix_caching", "enforce_eager",
    "gpu_memory_utilization", "limit_mm_per_prompt", "max_num_batched_tokens", "mm_processor_kwargs", "seed",
    "swap_space", "tokenizer", "tokenizer_mode", "trust_remote_code",
}  # fmt: skip
_INSTEAD = {
    "enable_lora": "adapter= of Qwen2AudioForConditionalGeneration.from_pretrained adds one to the weights",
    "kv_cache_dtype": "cache_dtype='int8' halves the cache",
    "quantization": "weights_dtype='int8' quantises the weights",
    "speculative_config": "there is no speculative decoding: leave it out, the output is the same",
    "tensor_parallel_size": "mesh=make_mesh(model=N) splits the model over N devices",
}


@dataclass(kw_only=True)
class SamplingParams:
    """Options of one answer, under vLLM's names and with its defaults; None is the default, and they may be assigned.

    Attributes:
        n: answers to each prompt, with seeds of their own.
        temperature: 0 for the most probable token each time.
        top_p, top_k, min_p: as in `GenerationConfig`; a top_k of 0 or -1 keeps all.
        repetition_penalty: as in `GenerationConfig`.
        max_tokens, min_tokens: of the answer; a max_tokens of None is the checkpoint's own limit.
        stop: one text or several that end it.
        stop_token_ids: ids that end it besides the checkpoint's.
        ignore_eos: whether the checkpoint's stop ids do not end it.
        seed: of its draws.
        skip_special_tokens: only True: the text is without them, the ids have them.
        presence_penalty, frequency_penalty: only 0: use repetition_penalty.
        logprobs: only None or 0 (those of the answer's own tokens, in `log_probs`).
    """

    n: int = 1
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    max_tokens: int | None = MAX_TOKENS
    min_tokens: int | None = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self.options(stops=())

    def options(self, *, stops: Sequence[int]) -> dict[str, Any]:
        """The options of `GenerationConfig`; `stops` are the checkpoint's stop ids.

        Raises:
            ValueError: an option that is not supported; what to use instead is named.
        """
        for name, neutral, remedy in (
            ("presence_penalty", (0,), "use repetition_penalty"),
            ("frequency_penalty", (0,), "use repetition_penalty"),
            ("skip_special_tokens", (True,), "decode token_ids yourself"),
            ("logprobs", (0,), "log_probs has those of the answer's own tokens"),
        ):
            if (value := getattr(self, name)) is not None and value not in neutral:
                raise ValueError(f"{name}={value!r} is not supported: {remedy}")
        temperature = 1.0 if self.temperature is None else self.temperature
        sampled = temperature > 0
        return {
            "do_sample": sampled,
            **({"temperature": temperature} if sampled else {}),
            "top_p": self.top_p,
            "top_k": max(self.top_k or 0, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            **({} if self.max_tokens is None else {"max_new_tokens": self.max_tokens}),
            "min_new_tokens": self.min_tokens or 0,
            "stop_strings": self.stop,
            "eos_token_id": (*(() if self.ignore_eos else stops), *(self.stop_token_ids or ())),
        }


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt; `finish_reason` is "stop" or "length", as in vLLM."""

    index: int
    text: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """The answers to a prompt, which is as it was given."""

    request_id: str
    prompt: Any
    prompt_tokens: int
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class LLM:
    """A model behind an engine, under vLLM's names. It can be closed, and closes at the end of a `with`."""

    def __init__(
        self,
        model: Any = EMBEDDED,
        *,
        dtype: Any = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        revision: str | None = None,
        mesh: Any = None,
        weights_dtype: str = "auto",
        cache_dtype: str = "auto",
        **words: Any,
    ):
        """Load a model and start an engine.

        Args:
            model: as for `Qwen2AudioForConditionalGeneration.from_pretrained`; so are the next ones not named here.
            dtype: see there.
            max_model_len: most tokens of a prompt and its answer: `positions` of the engine.
            max_num_seqs: rows that are decoded at a time: `slots` of the engine.
            revision: see there.
            mesh: see there.
            weights_dtype: see there.
            cache_dtype: see there.
            **words: options of vLLM's: those without effect are taken, others name what to write instead.

        Raises:
            TypeError: an unknown option.
            ValueError: one that is not supported, or as for `from_pretrained` and `Engine`.
        """
        for name, value in words.items():
            if name in _INSTEAD and value not in (None, 1, False, "auto"):
                raise ValueError(f"{name}={value!r} is not supported: {_INSTEAD[name]}")
            if name not in _INERT and name not in _INSTEAD:
                raise TypeError(f"LLM has no option {name!r}")
        loaded = Qwen2AudioForConditionalGeneration.from_pretrained(
            model, dtype=dtype, mesh=mesh, revision=revision, weights_dtype=weights_dtype, cache_dtype=cache_dtype
        )
        processor = Qwen2AudioProcessor.from_pretrained(model, revision=revision)
        self.engine = Engine(loaded, processor, slots=max_num_seqs, positions=max_model_len)
        self._defaults = loaded.generation_config
        self._processor = processor

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._processor.tokenizer

    def generate(
        self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, **words: Any
    ) -> list[RequestOutput]:
        """Continue raw prompts.

        Args:
            prompts: a text, {"prompt": text, "multi_modal_data": {"audio": clip or clips}}, or a list of such. A clip
                is what `load_audio` takes, or (samples, rate).
            sampling_params: for all of them, or one for each; default: the checkpoint's own settings.
            **words: use_tqdm, without effect.

        Raises:
            RequestError: a prompt that cannot be answered.
        """
        _check_words(words)
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        return self._answer(prompts, [self._fields(each) for each in prompts], sampling_params)

    def chat(
        self, messages: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, **words: Any
    ) -> list[RequestOutput]:
        """Answer a conversation or several, with messages as `apply_chat_template` takes them; see `generate`."""
        _check_words(words)
        chats = [messages] if isinstance(messages[0], Mapping) else list(messages)
        return self._answer(chats, [{"messages": chat} for chat in chats], sampling_params)

    def close(self) -> None:
        """End the engine."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, given: Sequence[Any], asked: Sequence[Mapping[str, Any]], params: Any) -> list[RequestOutput]:
        each = list(params) if isinstance(params, Sequence) else [params] * len(asked)
        if len(each) != len(asked):
            raise ValueError(f"{len(each)} sampling_params for {len(asked)} prompts: give one, or one for each")
        requests = [self._requests(fields, one) for fields, one in zip(asked, each, strict=True)]
        answers = self.engine.answers(request for group in requests for request in group)
        results = []
        for index, (prompt, group) in enumerate(zip(given, requests, strict=True)):
            found = []
            for _ in group:
                answer = next(answers)
                if isinstance(answer, Exception):
                    raise answer
                found.append(answer)
            outputs = [_output(place, answer) for place, answer in enumerate(found)]
            results.append(RequestOutput(str(index), prompt, found[0].prompt_tokens, outputs))
        return results

    def _fields(self, prompt: Any) -> dict[str, Any]:
        """What a request says; the engine takes text without placeholders for a turn of a chat, vLLM as it is."""
        text, clips = _text_and_clips(prompt)
        if (token := self._processor.audio_token) in text:
            return {"prompt": text, "clips": clips}
        if clips:
            raise ValueError(
                f"the prompt has no {token} for its clips: write <|audio_bos|>{token}<|audio_eos|> for each"
            )
        return {"inputs": self._processor(text=text)}

    def _requests(self, fields: Mapping[str, Any], params: SamplingParams | None) -> list[Request]:
        if params is None:
            return [Request(**fields)]
        options = params.options(stops=self._defaults.eos_token_id)
        seeds = [None if params.seed is None else params.seed + place for place in range(params.n or 1)]
        return [Request(**fields, options=options, seed=seed) for seed in seeds]


def _text_and_clips(prompt: Any) -> tuple[str, tuple[Any, ...]]:
    if isinstance(prompt, str):
        return prompt, ()
    if not isinstance(prompt, Mapping) or not isinstance(prompt.get("prompt"), str):
        raise ValueError('a prompt is a text, or {"prompt": text, "multi_modal_data": {"audio": clip}}')
    data = dict(prompt.get("multi_modal_data") or {})
    clips = data.pop("audio", None)
    if data:
        raise ValueError(f"multi_modal_data has {sorted(data)[0]!r}: this model hears sound alone, under 'audio'")
    clips = [] if clips is None else clips if isinstance(clips, list) else [clips]
    return prompt["prompt"], tuple(clips)


def _check_words(words: Mapping[str, Any]) -> None:
    if unknown := set(words) - {"use_tqdm"}:
        raise TypeError(f"there is no argument {sorted(unknown)[0]!r} here")


def _output(place: int, answer: Answer) -> CompletionOutput:
    reason = "stop" if answer.finish_reason in ("eos", "stop_string") else "length"
    return CompletionOutput(place, answer.text, answer.token_ids.tolist(), answer.log_probs.tolist(), reason)

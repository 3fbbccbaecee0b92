"""Options of the reference that are no fields of `GenerationConfig`: refused by name, or taken and dropped."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2audio_jax.config.unknown_keys import asks_for_nothing, could_matter

_BEAMS = "there is no beam search: leave it out for greedy decoding, or set do_sample=True, num_return_sequences=N"
_FILTERS = "use temperature, top_k, top_p and min_p"
_PENALTIES = "use repetition_penalty or no_repeat_ngram_size"
_LOGITS = "use logits_processor=, a pure function, with model.generate"
_FUNCTIONS = (
    "functions go to model.generate, model.stream and sessions, whose programs they become part of; in the engine, a "
    "batch job and the server many requests share one: use min_p, no_repeat_ngram_size, stop_strings or max_time"
)
_OUTPUTS = "return_dict_in_generate=True of generate gives log_probs; call the model for logits"
_DRAFTS = "there is no speculative decoding: leave it out, the output is the same"

# Option of the reference -> (neutral values besides None; what to use instead).
_LACKING: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_early_exit": ((), _DRAFTS),
    "assistant_model": ((), _DRAFTS),
    "bad_words_ids": ((), _LOGITS),
    "begin_suppress_tokens": ((), _LOGITS),
    "constraints": ((), _BEAMS),
    "continuous_batching_config": ((), "leave it out"),
    "custom_generate": ((), "leave it out"),
    "diversity_penalty": ((0,), _BEAMS),
    "dola_layers": ((), "leave it out"),
    "encoder_no_repeat_ngram_size": ((0,), _PENALTIES),
    "encoder_repetition_penalty": ((1,), _PENALTIES),
    "epsilon_cutoff": ((0,), _FILTERS),
    "eta_cutoff": ((0,), _FILTERS),
    "exponential_decay_length_penalty": ((), _LOGITS),
    "force_words_ids": ((), _BEAMS),
    "forced_bos_token_id": ((), "put the token at the end of the prompt"),
    "forced_eos_token_id": ((), "append the token to the result"),
    "guidance_scale": ((1,), "leave it out"),
    "is_assistant": ((False,), _DRAFTS),
    "logits_processor": ((), _FUNCTIONS),
    "min_length": ((0,), "use min_new_tokens, which does not count the prompt"),
    "negative_prompt_attention_mask": ((), "leave it out"),
    "negative_prompt_ids": ((), "leave it out"),
    "num_beam_groups": ((1,), _BEAMS),
    "num_beams": ((1,), _BEAMS),
    "output_attentions": ((False,), _OUTPUTS),
    "output_hidden_states": ((False,), _OUTPUTS),
    "output_logits": ((False,), _OUTPUTS),
    "output_scores": ((False,), _OUTPUTS),
    "penalty_alpha": ((0,), "contrastive search is not built: use do_sample=True with top_k and top_p"),
    "prefix_allowed_tokens_fn": ((), _LOGITS),
    "prompt_lookup_num_tokens": ((), _DRAFTS),
    "remove_invalid_values": ((False,), "leave it out: logits that are not numbers are a fault to be seen"),
    "return_dict_in_generate": ((False,), _OUTPUTS),
    "sequence_bias": ((), _LOGITS),
    "stopping_criteria": ((), _FUNCTIONS),
    "streamer": ((), "model.generate takes it; elsewhere iterate over stream(...)"),
    "suppress_tokens": ((), _LOGITS),
    "token_healing": ((False,), "leave it out"),
    "top_h": ((), _FILTERS),
    "typical_p": ((1,), _FILTERS),
    "use_mtp": ((False,), _DRAFTS),
    "watermarking_config": ((), "leave it out"),
}

# Accepted and dropped: they change no token as long as the options above are neutral (speed, memory, details of beam
# search and of speculative decoding, internal fields of the reference, and leftovers in older checkpoints).
_INERT = frozenset({
    "_commit_hash", "_from_model_config", "assistant_confidence_threshold", "assistant_ensemble_weight",
    "assistant_lookbehind", "cache_config", "cache_implementation", "chat_format", "compile_config",
    "decoder_start_token_id", "disable_compile", "early_stopping", "length_penalty", "low_memory", "max_cache_len",
    "max_matching_ngram_size", "max_window_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "prefill_chunk_size", "renormalize_logits", "speculation_type", "synced_gpus", "target_lookbehind",
    "transformers_version", "use_cache", "use_model_defaults",
})  # fmt: skip

_DECODING = re.compile(
    r"beam|bias|constrain|contrast|dry|eos|forbid|force|greedy|guid|length|logit|mirostat|ngram|penalt|prob|sampl|stop"
    r"|suppress|temperature|token_ids|top_|typical|xtc|^max_|^min_"
)
"""Words of options that change tokens in some engine."""


def is_without_effect(name: str, value: Any, *, fields: Sequence[str]) -> bool:
    """Return True for what a file may state and no token depends on; `fields` are those of `GenerationConfig`."""
    if name in _LACKING:
        return asks_for_nothing(value)
    if name in fields or name in _INERT:
        return False
    nothing = value is False or (not isinstance(value, bool) and value == 0)
    return nothing or not could_matter(name, value, known={*fields, *_LACKING}, words=_DECODING)


def known_options(
    options: Mapping[str, Any], *, fields: Sequence[str], unknown: type[Exception], where: str
) -> dict[str, Any]:
    """The options that are among `fields`.

    Raises:
        ValueError: an option of the reference that would be ignored, at a value that is not neutral.
        Exception: `unknown`, for a name that is none of either; the nearest field is named.
    """
    known = {}
    for name, value in options.items():
        if name in fields:
            known[name] = value
        elif name in _LACKING:
            neutral, remedy = _LACKING[name]
            if value is not None and not any(type(value) in (bool, int, float) and value == item for item in neutral):
                raise ValueError(f"{name}={value!r} is not supported: {remedy}")
        elif name not in _INERT:
            nearest = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.0)[0]
            raise unknown(f"{where} has no option {name!r}: the nearest is {nearest!r}")
    return known

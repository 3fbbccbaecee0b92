"""Strict parsing of config.json: keys that affect the computation, inert keys, and refused keys.

`config` builds on this module. Every key is a field of a dataclass there, a key with a fixed supported value, an inert
key, or an error if it could change the computation (see `unknown_keys`).
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from qwen2audio_jax.config.unknown_keys import asks_for_nothing, could_matter, logger
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.storage.bucket import Folder

Inert = tuple[tuple[str, str], ...]
"""Keys that do not change the computation, each with the JSON text of its value: hashable, written back verbatim."""

BYTE_ORDER_MARK = "\ufeff"
"""What some editors begin a file with; no part of the text."""

DTYPES = ("float32", "bfloat16", "float16")

_GENERATION = (  # noqa: SIM905
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_rollout assistant_lookbehind bad_words_ids "
    "begin_suppress_tokens cache_config cache_implementation constraints continuous_batching_config compile_config "
    "disable_compile diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids "
    "forced_bos_token_id forced_decoder_ids forced_eos_token_id guidance_scale is_assistant length_penalty low_memory "
    "max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size "
    "num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits "
    "output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits "
    "repetition_penalty return_dict_in_generate sequence_bias stop_strings suppress_tokens target_lookbehind "
    "temperature token_healing top_h top_k top_p typical_p watermarking_config"
).split()
# The reference reads generation settings from generation_config.json only and drops these from config.json.

_BOOKKEEPING = (  # noqa: SIM905
    "_attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation bos_token_id "
    "chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id finetuning_task id2label "
    "initializer_range label2id name_or_path num_labels output_attentions output_hidden_states prefix problem_type "
    "return_dict sep_token_id task_specific_params tf_legacy_loss tokenizer_class torchscript transformers_version "
    "use_bfloat16 use_cache"
).split()

COMMON_INERT = frozenset(_GENERATION + _BOOKKEEPING)
"""Keys that may occur in any section of a file saved by some release of transformers and change no output."""

COMMON_FIXED: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
}
"""Keys of any section that change the computation unless they hold one of these values."""

_CODE = "auto_map"
"""Code that comes with a checkpoint, by class. It is never run, nor by the reference for a model that it has itself."""

_ARCHITECTURE = re.compile(
    r"(^|_)(act|alpha|beta|bias|dim|eps|gate|kv|mask|num|pool|proj|qk|query|rank|scal|sink|size|theta|tied?|width)"
    r"|adapter|alibi|attend|attention|attn|audio|awq|block|bnb|causal|channel|compress|conv(?!er)|decoder|depth|embed"
    r"|encoder|expert|ffn|gptq|head|hidden|kernel|layer|load_in|logit|logn|mel_|mlp|moe|multiplier|norm|ntk|patch"
    r"|position|quant|residual|rope|rotary|router|shared|softcap|sparse|stride|token_i|window"
)
"""Words of keys that change what some model computes."""
_BESIDE = re.compile(
    r"^_|^output_|batch|dataset|deepspeed|drop|epoch|factory|flash|freez|frozen|gpus|_implementation$|lora|parallel|_path$"
    r"|peft|process|step|swift|_token_(id|index)$|train|unsloth|_version$|worker"
)
"""Words that make a key another tool's note, whatever else its name has."""
_NOTHING = re.compile(r"(?!)")


def read_json_object(path: Folder) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is missing, too large, not UTF-8 or not JSON, holds NaN, Infinity or a duplicate key, or is
            not an object; the message names the file.
    """
    try:
        size = path.stat().st_size
        if size > LIMITS.json_bytes:
            raise ValueError(f"{path}: {size} bytes; a configuration has at most {LIMITS.json_bytes}")
        text = path.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a folder that holds a config.json") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be a configuration") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds {describe(data)}; a configuration is a JSON object")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {twice[0]!r} stands twice in one object; keep one")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON or a configuration can hold")


def describe(value: object) -> str:
    """The value for an error message: JSON text, truncated if long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def present(data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not null: tables of data give every row the same keys and fill up with null."""
    return {key: value for key, value in data.items() if value is not None}


def without_nulls(value: Any) -> Any:
    """JSON data of which every object has only its `present` entries; lists keep their length."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def section_of(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The section `key`; absent and null both mean an empty one."""
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is {describe(value)}; it must be a JSON object")
    return dict(value)


def pop_alias(data: dict[str, Any], *, where: str, alias: str, key: str) -> None:
    """Move `alias` to its synonym `key`; both may be present if they agree."""
    if alias not in data:
        return
    value = data.pop(alias)
    if key in data and not same(data[key], value):
        raise ValueError(
            f"{where}{key} is {describe(data[key])} but {where}{alias}, its other name, is {describe(value)}; keep one"
        )
    data[key] = value


def split_inert(
    data: Mapping[str, Any], *, where: str, fixed: Mapping[str, tuple[Any, ...]], inert: Iterable[str], fields: set[str]
) -> tuple[dict[str, Any], Inert]:
    """Sort the keys of one section into (values of fields, inert rest).

    Args:
        data: the section.
        where: prefix of keys in error messages, such as "text_config.".
        fixed: keys besides `COMMON_FIXED` that are supported only with one of the given values.
        inert: keys besides `COMMON_INERT` whose value changes no output.
        fields: keys that are fields.

    Raises:
        ValueError: a key is unknown, or its value is not supported.
    """
    known_fixed, known_inert = {**COMMON_FIXED, **fixed}, COMMON_INERT.union(inert)
    values, rest = {}, []
    for key, value in data.items():
        if key in fields:
            values[key] = value
        elif key in known_fixed:
            if not any(same(value, supported) for supported in known_fixed[key]):
                choices = " or ".join(describe(supported) for supported in known_fixed[key])
                raise ValueError(
                    f"{where}{key} is {describe(value)}, which is not supported; supported: {choices}. "
                    f"A model trained with another value needs code that this project does not have"
                )
            rest.append((key, json_text(where + key, value)))
        elif key in ("dtype", "torch_dtype"):
            if value is not None:
                check_dtype(value, where=where + key)
            rest.append((key, json_text(where + key, value)))
        elif key in known_inert or not _matters(key, value, known={*fields, *known_fixed, "dtype", "torch_dtype"}):
            rest.append((key, json_text(where + key, value)))
        else:
            raise ValueError(
                f"{where}{key} is {describe(value)}: this key is not known, so its effect on the model is not either. "
                f"Check its spelling; delete it if it changes no output"
            )
    return values, tuple(sorted(rest))


def _matters(key: str, value: object, *, known: Iterable[str]) -> bool:
    """Return True if an unknown key could change what the model computes."""
    if key == _CODE and not asks_for_nothing(value):
        logger.warning("config.json: auto_map names code of the checkpoint's own (%s), which is not run", value)
        return False
    words = _NOTHING if _BESIDE.search(key.lower()) else _ARCHITECTURE
    return could_matter(key, value, known=set(known), words=words)


def inert_values(inert: Inert) -> dict[str, Any]:
    """The inert keys and values as they were in the JSON."""
    return {key: json.loads(text) for key, text in inert}


def check_positive_int(value: object, *, where: str) -> None:
    """Raise a ValueError unless `value` is an int (not a bool) from 1 to the limit."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} is {describe(value)}; it must be a whole number without quotes")
    if not 1 <= value <= LIMITS.config_size:
        raise ValueError(f"{where} is {describe(value)}; it must lie between 1 and {LIMITS.config_size}")


def check_token_id(value: object, *, where: str, vocab_size: int) -> None:
    """Raise a ValueError unless `value` is the id of an entry of the vocabulary."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} is {describe(value)}; it must be a token id, a whole number without quotes")
    if not 0 <= value < vocab_size:
        raise ValueError(
            f"{where} is {describe(value)}; with text_config.vocab_size {vocab_size} the ids go from 0 to "
            f"{vocab_size - 1}. Correct the one that is wrong"
        )


def positive_float(value: object, *, where: str) -> float:
    """`value` as a float; a ValueError unless it is a finite number above 0 (not a bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {describe(value)}; it must be a number without quotes")
    if not 0 < value < math.inf or value > sys.float_info.max:
        raise ValueError(f"{where} is {describe(value)}; it must be finite and above 0")
    return float(value)


def check_bool(value: object, *, where: str) -> None:
    """Raise a ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {describe(value)}; it must be true or false")


def check_dtype(value: object, *, where: str) -> None:
    """Raise a ValueError unless `value` names a supported compute dtype."""
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError(f"{where} is {describe(value)}; supported: {', '.join(map(describe, DTYPES))}")


def same(left: object, right: object) -> bool:
    """Equal as JSON values: true is not 1, but 10000 is 10000.0."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def json_text(where: str, value: object) -> str:
    """`value` as JSON text; a ValueError that names `where` if it is not representable in JSON."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {describe(value)}, which JSON cannot hold") from None

"""Generation options: the arguments of `generate`, read from generation_config.json and overridden by each call.

Names, defaults and meanings are those of transformers' `GenerationConfig`. An option of transformers that is not
supported here is refused by name if it would change the output, and accepted at its neutral value.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from qwen2audio_jax.config.frozen import refuses_assignment
from qwen2audio_jax.config.strict_json import BYTE_ORDER_MARK, present
from qwen2audio_jax.embedded import EMBEDDED, model_folder
from qwen2audio_jax.generation.grammars import check_choices, check_regex, check_schema, grammar_of
from qwen2audio_jax.generation.hotwords import check_hotwords
from qwen2audio_jax.generation.stopping import check_stop_strings
from qwen2audio_jax.generation.unsupported_options import is_without_effect, known_options
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.storage import hub
from qwen2audio_jax.storage.bucket import PathOrUrl, folder_at
from qwen2audio_jax.storage.resolve_folder import resolve_folder
from qwen2audio_jax.storage.write_whole import write_whole

FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 20
"""Number of new tokens if neither max_new_tokens nor max_length is given, as in the reference."""

# The meaning of None in a call: not the default but "without this option", as in the reference.
_WITHOUT: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "eos_token_id": (),
    "stop_strings": (),
    "hotwords": (),
    "num_return_sequences": 1,
}


@refuses_assignment(
    "pass it to generate({name}=...), or make it a default with model.generation_config = "
    "model.generation_config.updated({name}=...)"
)
@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The options of one call of `generate`.

    Construction checks every value, and takes what transformers' own takes, at values that change no token. `stated`
    has the names of the options that were given and not None.

    Raises:
        ValueError: a value of the wrong type or out of range, or several sequences without sampling.
    """

    do_sample: bool = False
    """Sample each token; otherwise take the most probable one, after repetition_penalty."""
    temperature: float = 1.0
    """Divides the scores, above 0; sampling only."""
    top_k: int = 50
    """Sample from this many most probable tokens; 0 for all; sampling only."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens whose mass reaches this, in (0, 1]; sampling only."""
    min_p: float = 0.0
    """Sample from tokens of at least this share of the most probable one's probability, in [0, 1]; sampling only."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and of the answer less (above 1) or more (below 1) probable, greedy or not."""
    no_repeat_ngram_size: int = 0
    """No such number of tokens in a row comes a second time in prompt and answer; 0 for no such rule."""
    max_new_tokens: int | None = None
    """Maximum of generated tokens. Takes precedence over `max_length` if both are set."""
    max_length: int | None = None
    """Maximum of tokens of prompt (its padding included) and answer together."""
    min_new_tokens: int | None = None
    """Minimum of generated tokens before a stop id is possible."""
    eos_token_id: tuple[int, ...] = ()
    """Ids that end a row; an int or any iterable of ints is accepted."""
    pad_token_id: int | None = None
    """The id that finished rows are padded with; the first stop id if None."""
    bos_token_id: int | None = None
    """Kept for callers that read it; generation does not use it."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a row, see `stopping`; one string or any sequence of strings is accepted."""
    choices: tuple[str, ...] | None = None
    """The answer is one of these texts; see `grammars`."""
    regex: str | None = None
    """The answer matches this regular expression as a whole (Rust's syntax, without look-around)."""
    json_schema: str | None = None
    """The answer is JSON of this schema; a mapping is accepted. Of this, `regex` and `choices` one can be given."""
    hotwords: tuple[str, ...] = ()
    """Words that are expected, and preferred where the sound leaves open what was said; see `hotwords`."""
    hotword_bonus: float | None = None
    """By how much, above 0: what each token of these words has more; None: `hotwords.BONUS`."""
    max_time: float | None = None
    """Seconds after which rows end with the token at hand; it depends on the machine, so the tokens do too."""
    stated: ClassVar[frozenset[str]] = frozenset()
    num_return_sequences: int = 1
    """Number of answers to each prompt."""

    def __post_init__(self):
        put = object.__setattr__
        if not isinstance(self.do_sample, bool | np.bool_):
            raise ValueError(f"do_sample={self.do_sample!r} is not a bool: give True or False")
        put(self, "do_sample", bool(self.do_sample))
        # Many callers write "greedy" as temperature 0; it is refused only when it would be used.
        zero_means_greedy = not self.do_sample and self.temperature == 0
        for name, low_excluded, high in (
            ("temperature", -1.0 if zero_means_greedy else 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
        ):
            put(self, name, _number(name, getattr(self, name), above=low_excluded, most=high))
        put(self, "min_p", 0.0 if self.min_p == 0 else _number("min_p", self.min_p, above=0.0, most=1.0))
        if self.max_time is not None:
            put(self, "max_time", _number("max_time", self.max_time, above=0.0, most=math.inf))
        put(self, "top_k", _integer("top_k", self.top_k, least=0, most=2**31 - 1))
        put(
            self,
            "num_return_sequences",
            _integer("num_return_sequences", self.num_return_sequences, least=1, most=LIMITS.sequences_per_prompt),
        )
        for name, least, most in (
            ("max_new_tokens", 1, LIMITS.new_tokens),
            ("max_length", 1, 2**31 - 1),
            ("min_new_tokens", 0, LIMITS.new_tokens),
            ("no_repeat_ngram_size", 0, LIMITS.ngram),
            ("pad_token_id", 0, 2**31 - 1),
            ("bos_token_id", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            put(self, name, None if value is None else _integer(name, value, least=least, most=most))
        put(self, "eos_token_id", _ids(self.eos_token_id))
        put(self, "stop_strings", check_stop_strings(self.stop_strings))
        put(self, "choices", check_choices(self.choices))
        put(self, "hotwords", check_hotwords(self.hotwords))
        if self.hotword_bonus is not None:
            put(self, "hotword_bonus", _number("hotword_bonus", self.hotword_bonus, above=0.0, most=100.0))
        put(self, "regex", check_regex(self.regex))
        put(self, "json_schema", check_schema(self.json_schema))
        if sum(value is not None for value in (self.choices, self.regex, self.json_schema)) > 1:
            raise ValueError("choices, regex and json_schema are three ways to constrain an answer: give one of them")
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} without sampling would give the same answer each "
                "time: set do_sample=True, or num_return_sequences=1"
            )

    @property
    def mode(self) -> Literal["greedy", "sample"]:
        """The `mode` of `sampling.next_token`."""
        return "sample" if self.do_sample else "greedy"

    @property
    def filler_token_id(self) -> int:
        """The id that finished rows are padded with: `pad_token_id`, else the first stop id, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def grammar(self) -> str | None:
        """What constrains the answer, in the library's words; None for nothing."""
        return grammar_of(choices=self.choices, regex=self.regex, json_schema=self.json_schema)

    def new_token_budget(self, prompt_length: int) -> int:
        """The maximum of tokens to generate after a prompt of `prompt_length` tokens.

        The reference takes a batch's padded width as the length of each of its prompts.

        Raises:
            ValueError: `max_length` leaves no room, or the budget is below `min_new_tokens` or beyond the limit.
        """
        if self.max_new_tokens is not None:
            budget, why = self.max_new_tokens, f"max_new_tokens={self.max_new_tokens}"
        elif self.max_length is not None:
            budget, why = self.max_length - prompt_length, f"max_length={self.max_length} less the prompt"
        else:
            budget, why = DEFAULT_NEW_TOKENS, "the default"
        if budget < 1:
            raise ValueError(
                f"max_length={self.max_length} counts the prompt, which has {prompt_length} tokens: raise it above "
                "that, or give max_new_tokens instead"
            )
        if budget > LIMITS.new_tokens:
            raise ValueError(f"{budget} new tokens ({why}) are more than {LIMITS.new_tokens}: ask for fewer")
        if self.min_new_tokens is not None and self.min_new_tokens > budget:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than the {budget} new tokens allowed ({why}): lower it, "
                "or raise max_new_tokens"
            )
        return budget

    def updated(self, **options: Any) -> "GenerationConfig":
        """Return this configuration with the options of a call, under the names of the reference.

        `generation_config=` stands for the options that were stated when it was made, here or in transformers, or for
        the entries of a mapping; options beside it take precedence over them.

        None means "without this option", as in the reference: `top_k=None` keeps all tokens. A length limit of the call
        replaces the checkpoint's, whichever of the two names each has; the reference would ignore a `max_length`
        beside the checkpoint's `max_new_tokens`.

        Raises:
            TypeError: an unknown option; the message names the nearest known one.
            ValueError: a value out of range, both limits at once, or an unsupported option of the reference.
        """
        if (whole := options.pop("generation_config", None)) is not None:
            options = {**_stated(whole, options), **options}
        known = _known(options, unknown=TypeError, where="generate()")
        known = {name: _WITHOUT.get(name) if value is None else value for name, value in known.items()}
        if known.get("max_length") is not None:
            if known.get("max_new_tokens") is not None:
                raise ValueError(
                    f"max_length={known['max_length']} (prompt included) and max_new_tokens={known['max_new_tokens']} "
                    "are two limits: give one of them"
                )
            known["max_new_tokens"] = None
        return replace(self, **known)

    @classmethod
    def from_pretrained(cls, source: PathOrUrl = EMBEDDED, *, revision: str | None = None) -> "GenerationConfig":
        """The options that a checkpoint states in its generation_config.json; without one: the defaults.

        Args:
            source: a folder, the URL of one in a bucket, or a hub id; default: the embedded model.
            revision: of a hub id.

        Raises:
            ValueError: no such folder or hub id, or as for `from_json_file`.
        """
        folder = model_folder() if source == EMBEDDED else resolve_folder(source, revision=revision)
        if folder is None:
            folder = hub.download(str(source), revision=revision, patterns=[FILE])
        return cls.from_json_file(folder / FILE) if (folder / FILE).exists() else cls()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write generation_config.json into a folder, which is made if it is missing."""
        path = Path(folder, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.to_json().encode())

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "GenerationConfig":
        """Read the content of a generation_config.json; None means the default.

        Options that change no token (`use_cache`, `transformers_version`, `chat_format`, ...) and the notes of other
        tools are dropped.

        Raises:
            ValueError: an unknown key that could change a token, a value out of range, or an unsupported option of the
                reference.
        """
        names = _names()
        read = {
            name: value for name, value in present(settings).items() if not is_without_effect(name, value, fields=names)
        }
        return cls(**_known(read, unknown=ValueError, where="generation_config.json"))

    @classmethod
    def from_json_file(cls, path: PathOrUrl) -> "GenerationConfig":
        """Read a generation_config.json.

        Raises:
            ValueError: not a JSON object, too large, or as for `from_dict`; the message names the file.
            OSError: the file cannot be read.
        """
        path = folder_at(path)
        if (size := path.stat().st_size) > LIMITS.json_bytes:
            raise ValueError(f"{path} has {size} bytes, more than {LIMITS.json_bytes}: this is no settings file")
        try:
            settings = json.loads(path.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK))
            if not isinstance(settings, dict):
                raise ValueError(f"holds a JSON {type(settings).__name__} where an object belongs")
            return cls.from_dict(settings)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The options that are set, in the form that `from_dict` and transformers' `GenerationConfig` read."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return {name: value for name, value in settings.items() if value is not None and value != []}

    def to_json(self) -> str:
        """The text of a generation_config.json."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


_take_fields = GenerationConfig.__init__


@wraps(_take_fields)
def _take_options(self: GenerationConfig, **options: Any) -> None:
    """Take what the reference's constructor takes: None is not there, and options without effect are dropped."""
    given = {name: value for name, value in options.items() if value is not None}
    known = _known(given, unknown=TypeError, where="GenerationConfig()")
    object.__setattr__(self, "stated", frozenset(known))
    _take_fields(self, **known)


setattr(GenerationConfig, "__init__", _take_options)  # noqa: B010  (a dataclass would take fields alone)


def _stated(whole: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a `generation_config=` stands for, but a limit of length where `options` has one."""
    if isinstance(whole, GenerationConfig):
        found = {name: getattr(whole, name) for name in whole.stated}
    elif isinstance(whole, Mapping):
        found = present(whole)
    elif hasattr(whole, "to_diff_dict"):  # the reference's
        found = present(whole.to_diff_dict())
    else:
        raise TypeError(f"generation_config is a {type(whole).__name__}: give a GenerationConfig or a mapping")
    limits = ("max_new_tokens", "max_length")
    if any(options.get(name) is not None for name in limits):
        found = {name: value for name, value in found.items() if name not in limits}
    elif found.get("max_new_tokens") is not None:
        found.pop("max_length", None)
    return found


def _known(options: Mapping[str, Any], *, unknown: type[Exception], where: str) -> dict[str, Any]:
    return known_options(options, fields=_names(), unknown=unknown, where=where)


def _names() -> list[str]:
    return [field.name for field in fields(GenerationConfig)]


def _number(name: str, value: Any, *, above: float, most: float) -> float:
    allowed = f"above {above:g}" if most == math.inf else f"above {above:g} and at most {most:g}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name}={value!r} is not a number: give one {allowed}")
    if not (math.isfinite(value) and above < value <= most):
        hint = ", or do_sample=False for the most probable token" if name == "temperature" else ""
        raise ValueError(f"{name}={value!r} is out of range: give a number {allowed}{hint}")
    return float(value)


def _integer(name: str, value: Any, *, least: int, most: int) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r} is not an int: give one in {least}..{most}")
    if not least <= index(value) <= most:
        raise ValueError(f"{name}={value!r} is out of range: give an int in {least}..{most}")
    return index(value)


def _ids(value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(dict.fromkeys(_integer("eos_token_id", token, least=0, most=2**31 - 1) for token in ids))

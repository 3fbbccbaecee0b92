"""Arguments of the model's calls, as users give them: by name, or as the processor returned them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2audio_jax.generation.stopping import Tokenizer

INPUTS = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
"""Arrays that the processor returns."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Arguments of `generate`, as the user gave them."""

    input_ids: Any
    attention_mask: Any = None
    input_features: Any = None
    feature_attention_mask: Any = None
    seed: int | Sequence[int] | None = None
    tokenizer: Tokenizer | None = None
    logits_processor: Any = None
    stopping_criteria: Any = None
    options: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: Any, *, options: Mapping[str, Any], **given: Any) -> "Arguments":
        """The arguments of a call whose first one may be what the processor returned, or ids alone.

        Raises:
            TypeError: no ids, or something that is there twice.
        """
        named = merged(inputs, {**options, **given})
        own = {name: named.pop(name) for name in given}
        if own["input_ids"] is None:
            raise TypeError("input_ids is missing: pass what the processor returns, as in generate(**inputs)")
        return cls(**own, options=named)


def merged(inputs: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with those in `inputs`: a mapping such as the processor returns, or input_ids alone.

    Raises:
        TypeError: an argument is in both.
    """
    entries = inputs if isinstance(inputs, Mapping) else {} if inputs is None else {"input_ids": inputs}
    if twice := [name for name in entries if given.get(name) is not None]:
        raise TypeError(f"{twice[0]} is given twice: in the inputs and as an argument")
    return {**given, **entries}

"""Random choices, regular expressions and bounded JSON schemas, and whether an answer is what they ask for."""

import json
import re
import string

import jsonschema
import numpy as np

STREET, RAIN = "Stra\N{LATIN SMALL LETTER SHARP S}e", "\N{CJK UNIFIED IDEOGRAPH-96E8}"
WORDS = ("dog", "cat", "rain", "a bell", STREET, RAIN, 'say "no"')
KINDS = ("integer", "string", "boolean", "enum", "null", "array", "object", "any")


def random_choices(rng: np.random.Generator) -> dict:
    """Texts that share beginnings, quotes and other alphabets among them."""
    count = int(rng.integers(1, 9))
    texts = {
        f"{rng.choice(WORDS)}{' and ' + str(rng.choice(WORDS)) if rng.random() < 0.5 else ''}" for _ in range(count)
    }
    return {"choices": sorted(texts)}


def random_regex(rng: np.random.Generator) -> dict:
    """A bounded expression: classes, counts, groups and alternatives."""

    def part(depth: int) -> str:
        kind = rng.integers(5 if depth else 3)
        if kind == 0:
            return re.escape(str(rng.choice(("ab", "7", "x.y", "("))))
        if kind == 1:
            return str(rng.choice(("[a-c]", "[0-9]", "[^a-z\\n]", "\\d", "[A-Z ]")))
        if kind == 2:
            low = int(rng.integers(0, 3))
            return f"{rng.choice(('[a-z]', '[0-9]'))}{{{low},{low + int(rng.integers(1, 3))}}}"
        if kind == 3:
            return f"(?:{part(depth - 1)}|{part(depth - 1)})"
        return f"(?:{part(depth - 1)}{part(depth - 1)})?"

    return {"regex": "".join(part(2) for _ in range(int(rng.integers(1, 5)))) + "[a-z0-9]"}


def random_schema(rng: np.random.Generator) -> dict:
    """A schema whose values have a largest size."""

    def value(depth: int) -> dict:
        kind = str(rng.choice(KINDS[: 8 if depth else 5]))
        if kind == "integer":
            low = int(rng.integers(-20, 20))
            return {"type": kind, "minimum": low, "maximum": low + int(rng.integers(0, 300))}
        if kind == "string":
            return {"type": kind, "minLength": int(rng.integers(0, 2)), "maxLength": int(rng.integers(2, 7))}
        if kind == "enum":
            return {"enum": [str(rng.choice(WORDS)), int(rng.integers(9)), None]}
        if kind == "array":
            return {"type": kind, "items": value(depth - 1), "maxItems": int(rng.integers(1, 4))}
        if kind == "object":
            names = list(string.ascii_lowercase[: rng.integers(1, 4)])
            required = [name for name in names if rng.random() < 0.7]
            properties = {name: value(depth - 1) for name in names}
            return {"type": kind, "properties": properties, "required": required, "additionalProperties": False}
        if kind == "any":
            return {"anyOf": [value(depth - 1), value(depth - 1)]}
        return {"type": kind}

    return {"json_schema": value(2)}


def is_valid(text: str, case: dict) -> bool:
    """Whether a whole answer is what it was to be, by the standard library and by jsonschema."""
    if "choices" in case:
        return text in case["choices"]
    if "regex" in case:
        return re.fullmatch(case["regex"], text) is not None
    try:
        jsonschema.validate(json.loads(text), case["json_schema"])
    except (ValueError, jsonschema.ValidationError):
        return False
    return True

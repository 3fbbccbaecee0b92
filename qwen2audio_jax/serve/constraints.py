"""Constraints on answers in requests: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`."""

from collections.abc import Mapping
from typing import Any

from qwen2audio_jax.config.strict_json import describe
from qwen2audio_jax.serve.errors import bad

STRUCTURED = {"choice": "choices", "regex": "regex", "json": "json_schema"}
"""vLLM's names and ours; with `guided_` before them they are its older ones."""


def constraint(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of generation for what these fields of a body ask for.

    Args:
        given: the values of response_format, structured_outputs and guided_*, None where they are absent.

    Raises:
        ApiError: another form, or several constraints.
    """
    found: list[dict[str, Any]] = []
    if given["response_format"] is not None:
        found.append(_response_format(given["response_format"]))
    if (structured := given["structured_outputs"]) is not None:
        if unknown := set(structured) - set(STRUCTURED):
            raise bad(f"structured_outputs has no {sorted(unknown)[0][:50]!r} here; it has choice, regex and json",
                      param="structured_outputs")  # fmt: skip
        found += [{STRUCTURED[name]: value} for name, value in structured.items() if value is not None]
    found += [
        {ours: given[f"guided_{name}"]} for name, ours in STRUCTURED.items() if given[f"guided_{name}"] is not None
    ]
    found = [options for options in found if options]
    if len(found) > 1:
        raise bad(
            "an answer has one constraint: a response_format, a choice, a regex or a json", param="response_format"
        )
    return found[0] if found else {}


def _response_format(value: Mapping[str, Any]) -> dict[str, Any]:
    kind = value.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind != "json_schema":
        raise bad("response_format.type is none of text, json_object and json_schema", param="response_format")
    schema = value.get("json_schema")
    schema = schema.get("schema") if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping):
        raise bad(f"response_format.json_schema.schema is {describe(schema)}; it must be a schema",
                  param="response_format")  # fmt: skip
    return {"json_schema": schema}

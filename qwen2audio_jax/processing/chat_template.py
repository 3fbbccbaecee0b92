"""Chat templates: conversations to prompt text, with the checkpoint's template or the default one."""

from collections.abc import Mapping
from contextvars import copy_context
from typing import Any

from qwen2audio_jax.limits import LIMITS, Limits
from qwen2audio_jax.processing.template_sandbox import BUDGET, Budget, compile_template

DEFAULT_CHAT_TEMPLATE = """\
{%- set counter = namespace(clips=0) -%}
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for item in message.content -%}
            {%- if 'audio' in item or 'audio_url' in item or item.type == 'audio' -%}
                {%- set counter.clips = counter.clips + 1 -%}
                {{- 'Audio ' ~ counter.clips ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n' -}}
            {%- elif 'text' in item -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""The default template, which Qwen2-Audio was trained on. Clips are numbered from 1 over the whole conversation.

Source: `transformers.Qwen2AudioProcessor.default_chat_template`.
"""


class ChatTemplate:
    """A chat template from a checkpoint, and therefore untrusted.

    Args:
        source: jinja2, at most `limits.template_chars` characters.
        limits: bounds on its length, its time and the text that it renders beyond its messages.

    Raises:
        ValueError: the source is too long or not a template.
    """

    def __init__(self, source: str, *, limits: Limits = LIMITS):
        if not isinstance(source, str):
            raise ValueError(f"a chat template must be a str of jinja2, not {type(source).__name__}")
        if len(source) > limits.template_chars:
            raise ValueError(
                f"the chat template has {len(source)} characters; the limit is {limits.template_chars}. Pass a shorter "
                f"one as chat_template="
            )
        self.source, self.limits = source, limits
        try:
            self._template = compile_template(source)
        except Exception as error:  # jinja2's own errors, and nesting too deep for Python's compiler
            raise ValueError(f"the chat template is not valid jinja2: {type(error).__name__}: {error}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables (`messages`, `add_generation_prompt`, the special tokens' strings).

        Raises:
            ValueError: the template failed, refused the conversation, took longer than `limits.template_seconds` or
                made more than `limits.template_chars` beyond what the variables hold.
        """
        # A string may grow where a template escapes it; the time limit bounds the rest.
        size = self.limits.template_chars + 4 * _text_size(variables)
        # A separate context: nested renderings in one thread keep separate budgets.
        return copy_context().run(self._render, variables, Budget(seconds=self.limits.template_seconds, size=size))

    def _render(self, variables: Mapping[str, Any], budget: Budget) -> str:
        BUDGET.set(budget)
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                budget.check(size)
                budget.step()
                pieces.append(piece)
        except Exception as error:  # a template can raise any exception
            raise ValueError(
                f"the chat template cannot render this conversation: {type(error).__name__}: {error}. Change the "
                f"conversation, or pass another template as chat_template="
            ) from None
        return "".join(pieces)


def _text_size(value: Any) -> int:
    """Characters and entries of plain data."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(1 + _text_size(key) + _text_size(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return sum(1 + _text_size(part) for part in value)
    return 1

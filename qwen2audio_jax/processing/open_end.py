"""Conversations whose last message is to be continued: the rendered text ends with it, without what would close it."""

from collections.abc import Mapping
from typing import Any

from qwen2audio_jax.processing.chat_template import ChatTemplate
from qwen2audio_jax.processing.conversation import iter_strings

LAST_PRIVATE_USE = 0x10FFFD


class OpenEnd(ChatTemplate):
    """A chat template whose text ends where the last text of the last message does.

    A character that occurs nowhere is put behind that text, before the spaces at its end, and the rendered text is cut
    at it; so it does not matter whether a template says the same elsewhere. Spaces that it trims are left out.
    """

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text up to the end of the last message.

        Raises:
            ValueError: as `ChatTemplate.render`; or the last message ends with no text, or the template leaves it out.
        """
        *before, last = variables["messages"]
        used = {character for text in iter_strings(last) for character in text}
        mark = next(chr(code) for code in range(LAST_PRIVATE_USE, 0, -1) if chr(code) not in used)
        content = last["content"]
        if isinstance(content, str):
            said, spaces = _split(content)
            content = said + mark + spaces
        elif content and content[-1]["type"] == "text":
            said, spaces = _split(content[-1]["text"])
            content = [*content[:-1], {**content[-1], "text": said + mark + spaces}]
        else:
            raise ValueError(
                "continue_final_message=True needs a last message that ends with text: write its beginning"
            )
        text, found, rest = (
            super().render({**variables, "messages": [*before, {**last, "content": content}]}).rpartition(mark)
        )
        if not found:
            raise ValueError("the chat template leaves out the end of the last message, so that it cannot be continued")
        return text + spaces if rest.startswith(spaces) else text


def _split(text: str) -> tuple[str, str]:
    """A text without the spaces at its end, and those."""
    said = text.rstrip()
    return said, text[len(said) :]

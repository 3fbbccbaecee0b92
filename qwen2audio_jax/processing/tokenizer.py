"""The tokenizer: text to token ids and back, on the `tokenizers` library."""

import json
import os
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qwen2audio_jax.processing.collate import ROWS, gathered, rows_of
from qwen2audio_jax.processing.control_tokens import (
    END_OF_TEXT,
    ControlToken,
    add_declared_tokens,
    as_special,
    declared_tokens,
    token_text,
)
from qwen2audio_jax.processing.output import ProcessorOutput, check_return_tensors, to_output
from qwen2audio_jax.processing.padding import check_side, pad_rows
from qwen2audio_jax.processing.tokenizer_faults import tokenizer_faults
from qwen2audio_jax.storage.write_whole import write_whole
from qwen2audio_jax.torch_style.attributes import TOKENIZER, no_attribute
from qwen2audio_jax.torch_style.call_options import refuse_unknown
from qwen2audio_jax.torch_style.loading_options import take_saving_options

CALL_OPTIONS = ("text", "padding", "padding_side", "max_length", "pad_to_multiple_of", "return_tensors")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
ATTRIBUTES = ("_tokenizer", "settings", "control_tokens", "special_tokens_map", "all_special_ids", "_plain")
ASSIGNABLE = "what can be is padding_side and pad_token, eos_token, bos_token, unk_token or their ids"
REMEDIES = {
    "chat_template": "assign it to the processor, or pass chat_template= to apply_chat_template",
    "model_max_length": "texts are never cut: pass max_length= and padding='max_length' to the processor",
    "truncation_side": "texts are never cut: shorten them before",
}
"""What to do instead of an assignment that users of transformers write."""


class Qwen2AudioTokenizer:
    """The checkpoint's byte-level BPE with its control tokens.

    Source: `transformers.Qwen2Tokenizer`. An instance may be shared between threads as long as none of them assigns.

    Attributes:
        pad_token, eos_token, bos_token, unk_token: strings, or None where the checkpoint names none; another token of
            the vocabulary may be assigned.
        pad_token_id, eos_token_id, bos_token_id, unk_token_id: their ids; likewise.
        vocab_size: number of entries without the control tokens; `len(tokenizer)` counts those too.
        control_tokens: every control token by its string.
        padding_side: "left", which generation needs, or "right": how the processor pads where it is not told.
    """

    def __init__(self, tokenizer_json: str, *, settings: Mapping[str, Any]):
        """Build from the text of tokenizer.json and the values of tokenizer_config.json.

        Raises:
            ValueError: the files disagree about a token, or name one that does not exist.
        """
        with tokenizer_faults("tokenizer.json is not a tokenizer of the tokenizers library"):
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self.padding_side = "left"
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        add_declared_tokens(self._tokenizer, declared_tokens(settings))
        self.settings = dict(settings)
        self.control_tokens = {
            token.content: ControlToken(token.content, id, token.special)
            for id, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
        }
        self.special_tokens_map: dict[str, str] = {}
        for name in SPECIAL_NAMES:
            # The reference's class falls back to the end-of-text token for everything but bos.
            default = END_OF_TEXT if name != "bos_token" and END_OF_TEXT in self.control_tokens else None
            token = token_text(settings.get(name, default), where=name)
            if token is None and name == "pad_token":
                token = default
            if token is not None:
                if self._tokenizer.token_to_id(token) is None:
                    raise ValueError(f"tokenizer_config.json: {name} {token!r} is not in tokenizer.json; add it there")
                self.special_tokens_map[name] = token
        if "pad_token" not in self.special_tokens_map:
            raise ValueError(
                f'tokenizer_config.json names no pad_token and tokenizer.json has no {END_OF_TEXT}; set "pad_token"'
            )
        self.all_special_ids = frozenset(token.id for token in self.control_tokens.values() if token.special)
        self._plain: dict[frozenset[str], Tokenizer] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: the tokenizers with control tokens disabled are built again where they are used."""
        return {
            **self.__dict__,
            "_plain": {},
            "settings": dict(self.settings),
            "special_tokens_map": dict(self.special_tokens_map),
        }

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign `padding_side` or a special token, by its string or its id.

        Raises:
            AttributeError: another attribute, which would have no effect.
            ValueError: no side, no token of the vocabulary, or no padding token.
        """
        base = name.removesuffix("_id")
        if base in SPECIAL_NAMES:
            token = value if base == name else self._token_of(name, value)
            self._set_special(base, token)
        elif name == "padding_side":
            check_side(value)
            object.__setattr__(self, name, value)
        elif name in ATTRIBUTES and name not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"the tokenizer's {name} cannot be assigned; {REMEDIES.get(name, ASSIGNABLE)}")

    def _token_of(self, name: str, id: Any) -> str | None:
        if id is None:
            return None
        token = (
            self._tokenizer.id_to_token(index(id)) if hasattr(id, "__index__") and 0 <= index(id) < 1 << 32 else None
        )
        if token is None:
            raise ValueError(f"{name} {id!r} is not an id of this vocabulary; give one in 0..{len(self) - 1}")
        return token

    def _set_special(self, name: str, token: Any) -> None:
        if token is None and name != "pad_token":
            self.special_tokens_map.pop(name, None)
        elif not isinstance(token, str) or self._tokenizer.token_to_id(token) is None:
            raise ValueError(f"{name} {token!r} is not a token of this vocabulary; give the string of one that is")
        else:
            self.special_tokens_map[name] = token
        self.settings[name] = token

    def __getattr__(self, name: str) -> Any:
        """Attributes `pad_token`, `pad_token_id` and so on; None if the checkpoint names no such token."""
        base = name.removesuffix("_id")
        if base not in SPECIAL_NAMES:
            raise no_attribute("tokenizer", name, TOKENIZER)
        token = self.special_tokens_map.get(base)
        return token if base == name or token is None else self._tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of entries of the vocabulary without the control tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def all_special_tokens(self) -> list[str]:
        """The strings that `skip_special_tokens` removes, in order of id."""
        return [token.content for token in self.control_tokens.values() if token.special]

    def get_vocab(self) -> dict[str, int]:
        """The vocabulary: every token's string in the byte alphabet, with its id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """The text of a tokenizer.json for this tokenizer."""
        return self._tokenizer.to_str(pretty=True)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str | None = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **words: Any,
    ) -> ProcessorOutput:
        """The ids of one text or several, padded to the longest.

        Args:
            text: control tokens in it become their ids, as in `encode`.
            padding: as for the processor; so are the next three. (The reference does not pad unless asked.)
            padding_side: default: the tokenizer's.
            max_length: see there.
            pad_to_multiple_of: see there.
            return_tensors: None or "np" for numpy, "jax" for JAX arrays.
            **words: of the reference, at values that change nothing here, as add_special_tokens and truncation=False.

        Returns:
            input_ids and attention_mask, [B, T] int32; [T] for a single text unless `return_tensors` is given.

        Raises:
            TypeError: an unknown option.
            ValueError: an option with a value that is unknown or does not fit.
        """
        refuse_unknown(words, CALL_OPTIONS)
        check_return_tensors(return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("there are no texts to encode; pass at least one")
        arrays = pad_rows(
            [np.asarray(self.encode(one), np.int32) for one in texts],
            pad_id=self.pad_token_id,
            padding=padding,
            padding_side=self.padding_side if padding_side is None else padding_side,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        if isinstance(text, str) and return_tensors is None:
            arrays = {name: row for name, [row] in arrays.items()}
        return to_output(arrays, return_tensors=return_tensors)

    def pad(
        self, encoded_inputs: Any, *, padding: bool | str | None = True, return_tensors: str | None = None, **more: Any
    ) -> ProcessorOutput:
        """Rows of several calls padded together.

        Args:
            encoded_inputs: a list of mappings with input_ids, [T] or [B, T] each, and perhaps attention_mask, which
                says what pads them already; or one mapping of such lists.
            padding: as for the processor.
            return_tensors: None or "np" for numpy, "jax" for JAX arrays.
            **more: padding_side, max_length and pad_to_multiple_of, as for the processor.

        Returns:
            input_ids and attention_mask, [B, T] int32.

        Raises:
            ValueError: another name, ids that are none, or an option that does not fit.
        """
        rows = rows_of(gathered(encoded_inputs, known=ROWS, needed="input_ids"))
        options = {
            "padding_side": self.padding_side,
            **{name: value for name, value in more.items() if value is not None},
        }
        return to_output(
            pad_rows(rows, pad_id=self.pad_token_id, padding=padding, **options), return_tensors=return_tensors
        )

    def save_pretrained(self, folder: str | os.PathLike[str], **words: Any) -> list[str]:
        """Write tokenizer.json and tokenizer_config.json into a folder, which is made if it is missing; their paths.

        `words`: of the reference, at values that change nothing, as push_to_hub=False.
        """
        take_saving_options(words)
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self.settings, indent=2, ensure_ascii=False)
        texts = {"tokenizer.json": self.to_json(), "tokenizer_config.json": f"{settings}\n"}
        for name, text in texts.items():
            write_whole(place / name, text.encode())
        return [str(place / name) for name in texts]

    def tokenize(self, text: str) -> list[str]:
        """The strings of a text's tokens in the byte alphabet."""
        return self.convert_ids_to_tokens(self.encode(text))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; control tokens in it become their ids, as in the reference, and none are added."""
        return self._tokenizer.encode(_check_text(text), add_special_tokens=False).ids

    def encode_plain(self, text: str, *, also_plain: frozenset[str] = frozenset()) -> list[int]:
        """Ids of a text without control tokens: `<|im_end|>` is encoded as its characters.

        Tokens that were added to the vocabulary but are not special stay tokens, except those in `also_plain`.
        """
        # The same tokenizer with control tokens disabled: a second object, because the setting belongs to the object
        # and another thread may be encoding with the first. Two threads may both build it; either will do.
        plain = self._plain.get(also_plain)
        if plain is None:
            plain = self._plain[also_plain] = self._build_plain(also_plain)
        return plain.encode(_check_text(text), add_special_tokens=False).ids

    def _build_plain(self, also_plain: frozenset[str]) -> Tokenizer:
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        added = self._tokenizer.get_added_tokens_decoder().values()
        plain.add_special_tokens([as_special(token) for token in added if token.content in also_plain])
        plain.encode_special_tokens = True
        return plain

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token's string, or the ids of several.

        Raises:
            ValueError: there is no such token. (The reference gives None or the id of `unk_token`.)
        """
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        id = self._tokenizer.token_to_id(tokens)
        if id is None:
            raise ValueError(f"{tokens!r} is not a token of this vocabulary; encode() splits text into tokens")
        return id

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The strings of ids in the byte alphabet; None for an id without a token."""
        if np.ndim(ids) == 0:
            return self._tokenizer.id_to_token(_to_ids(ids)[0])
        return [self._tokenizer.id_to_token(id) for id in _to_ids(ids)]

    def decode(
        self, ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of one sequence of ids, or the texts of several.

        Args:
            ids: an int, a sequence or array [T] of ints, or several of those: a list of sequences, an array [B, T].
            skip_special_tokens: omit special tokens, including padding.
            clean_up_tokenization_spaces: accepted without effect: the clean-up would damage the text of a byte-level
                BPE, and the reference does not apply it to one either.

        Returns:
            A str, or a list of them for several sequences. Invalid UTF-8 becomes U+FFFD; ids without a token (a model's
            vocabulary may be padded) are omitted.

        Raises:
            ValueError: an id is negative (such as the -100 of ignored labels) or not an integer.
        """
        if _is_batch(ids):
            return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in ids]
        return self._tokenizer.decode(_to_ids(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """`decode` that always returns a list, of one text for a single sequence."""
        if not _is_batch(sequences) and not isinstance(sequences, int | np.integer) and len(sequences) == 0:
            return []
        texts = self.decode(sequences, skip_special_tokens=skip_special_tokens)
        return [texts] if isinstance(texts, str) else texts


def _check_text(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, which "
            f"is no character; decode the text it came from correctly"
        ) from None
    return text


def _is_batch(ids: Any) -> bool:
    """Return True for several sequences of ids."""
    if hasattr(ids, "ndim"):
        return ids.ndim == 2
    return isinstance(ids, list | tuple) and len(ids) > 0 and np.ndim(ids[0]) > 0


def _to_ids(ids: Any) -> list[int]:
    array = np.asarray(ids)
    if array.size == 0:
        return []
    if array.ndim > 1 or array.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers [T], not {array.dtype} of shape {list(array.shape)}")
    if int(array.min()) < 0 or int(array.max()) >= 1 << 32:
        wrong = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise ValueError(f"{wrong} is no token id; drop it (as with labels[labels >= 0]) before decoding")
    return [int(id) for id in array.reshape(-1)]

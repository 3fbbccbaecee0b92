"""Tokenizers saved as vocab.json and merges.txt, without a tokenizer.json: what transformers' slow classes write.

Source: `transformers.Qwen2Tokenizer`, and the legacy files that `from_pretrained` reads beside these two.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from qwen2audio_jax.config.strict_json import describe, read_json_object
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.tokenizer_faults import tokenizer_faults
from qwen2audio_jax.storage.bucket import Folder

VOCAB, MERGES, ADDED, SPECIAL_MAP = "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"
CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
"""Values of tokenizer_class: another class splits text in another way."""
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pieces of text within which bytes are merged."""


def has_bpe_files(folder: Folder) -> bool:
    """Return True if the folder holds vocab.json and merges.txt."""
    return (folder / VOCAB).is_file() and (folder / MERGES).is_file()


def read_bpe_files(folder: Folder, *, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of the tokenizer.json that the files amount to, and tokenizer_config.json with all added tokens.

    Args:
        folder: with vocab.json and merges.txt; added_tokens.json and special_tokens_map.json are read if there.
        settings: the content of tokenizer_config.json.

    Raises:
        ValueError: a file is too large or damaged, or the tokenizer is of another class.
    """
    if (kind := settings.get("tokenizer_class")) not in CLASSES:
        raise ValueError(
            f"{folder}: tokenizer_class is {describe(kind)}, and vocab.json and merges.txt are read as a "
            "Qwen2Tokenizer's alone; save the tokenizer with transformers, which writes a tokenizer.json"
        )
    vocab = read_json_object(folder / VOCAB)
    for token, id in vocab.items():
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 1 << 32:
            raise ValueError(f"{folder / VOCAB}: token {token!r} has the id {describe(id)}; it must be a whole number")
    merges = _merges(folder / MERGES)
    with tokenizer_faults(f"{folder}: {VOCAB} and {MERGES} make no tokenizer"):
        model = BPE(vocab=vocab, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if not settings.get("added_tokens_decoder"):
        beside = read_json_object(folder / SPECIAL_MAP) if (folder / SPECIAL_MAP).is_file() else {}
        settings = {**beside, **{key: value for key, value in settings.items() if value is not None}}
        settings["added_tokens_decoder"] = _added(folder / ADDED, special=_special(settings))
    return tokenizer.to_str(), dict(settings)


def _merges(path: Folder) -> list[tuple[str, str]]:
    if (size := path.stat().st_size) > LIMITS.json_bytes:
        raise ValueError(f"{path}: {size} bytes; it has at most {LIMITS.json_bytes}")
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if lines[0].startswith("#version"):
        lines[0] = ""
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2 and pair != ("",):
            raise ValueError(f"{path}: line {number} is {describe(' '.join(pair))}; it must be two tokens to merge")
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _special(settings: Mapping[str, Any]) -> set[str]:
    """The tokens that the settings name as special."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        named += more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else []
    texts = [value.get("content") if isinstance(value, Mapping) else value for value in named]
    return {text for text in texts if isinstance(text, str)}


def _added(path: Folder, *, special: set[str]) -> dict[str, Any]:
    """The tokens of added_tokens.json as tokenizer_config.json's added_tokens_decoder has them."""
    found = {}
    for token, id in (read_json_object(path) if path.is_file() else {}).items():
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise ValueError(f"{path}: token {token!r} has the id {describe(id)}; it must be a whole number")
        # <|...|> is a control token whether or not it is called one: text must not be able to write it.
        control = token in special or (token.startswith("<|") and token.endswith("|>"))
        found[str(id)] = {"content": token, "special": control, "normalized": not control}
    return found

"""Normalisers of transcripts, in two named profiles: text -> the tokens that are compared.

`qwen` does what the script of the published figures does: control tokens away; English by Whisper's English
normaliser, then its basic one; other languages by the basic one; Chinese numerals written out; Cantonese simplified;
Chinese and Cantonese by character. `open-asr` does what the Open ASR leaderboard does.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwen2audio_jax.evaluation.extra import import_extra, versions

PROFILES = ("qwen", "open-asr")
CHARACTERS = ("zh", "yue", "ja")
"""Languages without spaces between words: their error rate is that of characters."""

Normalise = Callable[[str], str]
_TAGS = re.compile(r"<\|.*?\|>")
_LATER = ("kinda", "sorta", "dunno", "cause")
"""Words that the package replaces and OpenAI's own table, which both profiles are defined by, does not."""


@dataclass(frozen=True)
class Normaliser:
    """What makes texts comparable.

    Attributes:
        profile: one of `PROFILES`.
        language: of the texts.
        text: text -> normalised text.
        signature: what it is made of, with versions.
        compounds: whether words written together and apart are the same.
    """

    profile: str
    language: str
    text: Normalise
    signature: str
    compounds: bool = False

    def words(self, text: str) -> list[str]:
        """The words of a text."""
        return self.text(text).split()

    def characters(self, text: str) -> list[str]:
        """The characters of a text; spaces count where the language has them between words."""
        return list(("" if self.language in CHARACTERS else " ").join(self.words(text)))

    def tokens(self, text: str) -> list[str]:
        """What the language is scored by: words, or characters."""
        return self.characters(text) if self.language in CHARACTERS else self.words(text)


@cache
def normaliser(profile: str, language: str) -> Normaliser:
    """The normaliser of a profile for a language.

    Raises:
        ValueError: there is no such profile, or a package is not installed.
    """
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}; there are {', '.join(PROFILES)}")
    makers: dict[tuple[str, str], Callable[[], tuple[Normalise, str]]] = {
        ("qwen", "en"): _qwen_english,
        ("qwen", "zh"): _qwen_chinese,
        ("qwen", "yue"): _qwen_cantonese,
        ("open-asr", "en"): _open_asr_english,
        ("open-asr", "zh"): _open_asr_chinese,
        ("open-asr", "yue"): _open_asr_chinese,
    }
    others = {"qwen": _qwen_other, "open-asr": lambda: _open_asr_other(language)}
    text, signature = makers.get((profile, language), others[profile])()
    return Normaliser(
        profile, language, text, signature, compounds=profile == "open-asr" and language not in CHARACTERS
    )


# qwen


def _qwen_english() -> tuple[Normalise, str]:
    english, basic = _english(), _basic()
    return lambda text: basic(english(_untagged(text))), f"tags, english, basic ({versions('whisper-normalizer')})"


def _qwen_chinese() -> tuple[Normalise, str]:
    numerals, basic = _numerals(), _basic()
    signature = f"tags, numerals, basic ({versions('wetext', 'whisper-normalizer')})"
    return lambda text: basic(numerals(_untagged(text))), signature


def _qwen_cantonese() -> tuple[Normalise, str]:
    simplified, basic = _simplified(), _basic()
    signature = f"tags, t2s, basic ({versions('opencc', 'whisper-normalizer')})"
    return lambda text: basic(simplified(_untagged(text))), signature


def _qwen_other() -> tuple[Normalise, str]:
    basic = _basic()
    return lambda text: basic(_untagged(text)), f"tags, basic ({versions('whisper-normalizer')})"


# open-asr


def _open_asr_english() -> tuple[Normalise, str]:
    english = _english()
    signature = f"ellipses, abbreviations, english, compounds ({versions('whisper-normalizer')})"
    return lambda text: english(_abbreviated(text)), signature


def _open_asr_chinese() -> tuple[Normalise, str]:
    numerals, simplified, basic = _numerals(), _simplified(), _basic(preserve_marks=True)

    def normalise(text: str) -> str:
        text = simplified(unicodedata.normalize("NFKC", text)).lower()
        text = re.sub(r"[()]", " ", re.sub(r"[<\[][^>\]]*[>\]]", "", text))
        text = re.sub(r"(?<=[\u3400-\u9fff])\s+|\s+(?=[\u3400-\u9fff])", "", text)
        return basic(numerals(text).replace("\u3007", "\u96f6"))

    return normalise, f"NFKC, t2s, numerals, basic ({versions('opencc', 'wetext', 'whisper-normalizer')})"


def _open_asr_other(language: str) -> tuple[Normalise, str]:
    basic, num2words = _basic(preserve_marks=True), import_extra("num2words").num2words

    def in_words(found: re.Match[str]) -> str:
        try:
            return num2words(int(found[0]), lang=language)
        except (NotImplementedError, OverflowError, ValueError):
            return found[0]

    def normalise(text: str) -> str:
        text = re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", basic(text))).strip()
        return re.sub(r"\d+", in_words, re.sub(r"(\d)\s+(\d{3})\b", r"\1\2", text))

    return normalise, f"basic, numbers in words, compounds ({versions('whisper-normalizer', 'num2words')})"


# What they are made of


def _untagged(text: str) -> str:
    return _TAGS.sub(" ", text)


def _abbreviated(text: str) -> str:
    """English without ellipses, and with spelled abbreviations in one word, as the leaderboard has them."""
    text = re.sub(r"\s*\.{3,}\s*", " ", re.sub(r"\.{3,}\s*$", "", text.lower()))
    text = re.sub(r"\b([a-z])\.([a-z])\.([a-z])\.s\b", r"\1\2\3s", text)
    for count in (4, 3, 2):
        text = re.sub(r"\b" + r"\.".join(["([a-z])"] * count) + r"\.?\b", _joined(count), text)
    for count in (4, 3, 2):
        text = re.sub(r"\b" + r"\.\s+".join(["([a-z])"] * count) + r"\.\b", _joined(count), text)
    return re.sub(r"\b([a-z])\.([a-z])\.([a-z])\.'s\b", r"\1\2\3s", text)


def _joined(count: int) -> str:
    return "".join(rf"\{number}" for number in range(1, count + 1))


@cache
def _english() -> Normalise:
    """Whisper's English normaliser, with OpenAI's table of contractions."""
    english = import_extra("whisper_normalizer.english").EnglishTextNormalizer()
    for word in _LATER:
        english.replacers.pop(rf"\b{word}\b", None)
    return english


@cache
def _basic(*, preserve_marks: bool = False) -> Normalise:
    return import_extra("whisper_normalizer.basic").BasicTextNormalizer(preserve_marks=preserve_marks)


@cache
def _simplified() -> Normalise:
    return import_extra("opencc").OpenCC("t2s").convert


@cache
def _numerals() -> Normalise:
    """Arabic numbers in Chinese text, written out."""
    normalizer: Any = import_extra("wetext").Normalizer(lang="zh", operator="tn")
    return normalizer.normalize

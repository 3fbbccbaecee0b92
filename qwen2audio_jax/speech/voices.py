"""Voices: accents and variants of espeak-ng's English, and those held out of training."""

from typing import Any, Literal

import numpy as np

ACCENTS = ("en-US", "en", "en-GB-scotland", "en-GB-x-rp", "en-029", "en-GB-x-gbclan", "en-US-nyc")
UNSEEN_ACCENTS = ("en-GB-x-gbcwmd",)
LOW = (
    *("", "m1", "m2", "m3", "m5", "m6", "m8", "klatt", "klatt2", "Andy", "Denis", "Gene", "Hugo", "Jacky", "Lee"),
    *("Michael", "adam", "ed", "edward", "iven", "john", "max", "michel", "norbert", "robert", "travis", "sandro"),
)
HIGH = ("f1", "f2", "f4", "f5", "steph", "steph3", "shelby", "belinda", "aunty", "grandma")
# None of these is a near copy of one above, as many of espeak-ng's variants are of each other.
UNSEEN_LOW = ("m4", "m7", "quincy", "victor", "Mike")
UNSEEN_HIGH = ("f3", "Annie", "Andrea")

Sex = Literal["low", "high"]
"""The pitch class of a voice; a low one is male."""
RATES = (110, 230)
"""Minimum and maximum words per minute; espeak-ng's default is 175."""


def draw_voice(rng: np.random.Generator, *, unseen: bool, sex: Sex | None = None) -> dict[str, Any]:
    """Draw voice parameters: `voice` (espeak-ng's name), `rate` in words per minute, `pitch` and `range` 0..99.

    `unseen` takes the variants held out of training, in any accent. `sex` "low" or "high" restricts the variants.
    """
    high = sex == "high" if sex else bool(rng.random() < 0.5)
    variants = (UNSEEN_HIGH if high else UNSEEN_LOW) if unseen else (HIGH if high else LOW)
    accents = (*ACCENTS, *UNSEEN_ACCENTS) if unseen else ACCENTS
    accent, variant = accents[rng.integers(len(accents))], variants[rng.integers(len(variants))]
    if sex == "low":
        pitch = rng.integers(0, 60)
    elif sex == "high":
        pitch = rng.integers(40, 100)
    else:
        pitch = np.clip(round(rng.normal(50, 22)), 0, 99)
    return {
        "voice": f"{accent}+{variant}" if variant else accent,
        "rate": int(rng.integers(RATES[0], RATES[1] + 1)),
        "pitch": int(pitch),
        "range": int(rng.integers(20, 90)),
    }

"""Error rates of transcripts: insertions, deletions and substitutions over the tokens of the references."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

from qwen2audio_jax.evaluation.extra import import_extra

REPLICATIONS = 1000
"""Of the bootstrap (Bisani and Ney, 2004); its seed is 0."""


@dataclass(frozen=True)
class ErrorRate:
    """The error rate of many utterances, all their tokens together.

    Attributes:
        rate: errors over tokens of the references; 0.1 is 10 %, and it can be above 1. None without such tokens.
        low: lower end of the 95 % interval; None where hardly any reference has a token.
        high: its upper end.
        insertions: tokens that nobody said.
        deletions: tokens that are missing.
        substitutions: tokens in the place of others.
        tokens: of the references.
        utterances: how many there are.
        right: utterances without an error.
    """

    rate: float | None
    low: float | None
    high: float | None
    insertions: int
    deletions: int
    substitutions: int
    tokens: int
    utterances: int
    right: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def error_rate(
    references: Sequence[Sequence[Sequence[str]]], said: Sequence[Sequence[str]], *, compounds: bool = False
) -> ErrorRate:
    """The error rate of utterances.

    Args:
        references: of each utterance the texts of which each is right, as tokens; the nearest one counts.
        said: of each the answer, as tokens.
        compounds: words written together and apart are the same.

    Raises:
        ValueError: kaldialign is not installed, or the numbers differ.
    """
    kaldialign = import_extra("kaldialign")
    pairs = [
        _nearest([list(text) for text in texts], list(answer), compounds=compounds)
        for texts, answer in zip(references, said, strict=True)
    ]
    counts = [kaldialign.edit_distance(*pair, merge_compounds=compounds) for pair in pairs]
    sums = {name: sum(int(each[name]) for each in counts) for name in ("ins", "del", "sub", "total", "ref_len")}
    low = high = None
    if sums["ref_len"]:
        ends = kaldialign.bootstrap_wer_ci(
            [pair[0] for pair in pairs],
            [pair[1] for pair in pairs],
            replications=REPLICATIONS,
            merge_compounds=compounds,
        )
        if math.isfinite(ends["wer"]):  # a draw may hold no reference token
            low, high = max(float(ends["ci95min"]), 0.0), float(ends["ci95max"])
    return ErrorRate(
        rate=sums["total"] / sums["ref_len"] if sums["ref_len"] else None,
        low=low,
        high=high,
        insertions=sums["ins"],
        deletions=sums["del"],
        substitutions=sums["sub"],
        tokens=sums["ref_len"],
        utterances=len(pairs),
        right=sum(each["total"] == 0 for each in counts),
    )


def _nearest(texts: Sequence[list[str]], answer: list[str], *, compounds: bool) -> tuple[list[str], list[str]]:
    """The reference with the fewest errors a token, and the answer, as they are compared."""
    kaldialign = import_extra("kaldialign")
    pairs = [joined(text, answer) if compounds else (text, answer) for text in texts]
    return min(pairs, key=lambda pair: kaldialign.edit_distance(*pair, merge_compounds=compounds)["err_rate"])


def joined(reference: Sequence[str], said: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two texts' words, joined where they differ in their spaces alone, as the Open ASR leaderboard has them."""
    one: list[str] = []
    other: list[str] = []
    for kind, a, b, c, d in SequenceMatcher(None, reference, said).get_opcodes():
        mine, theirs = list(reference[a:b]), list(said[c:d])
        same = kind != "equal" and "".join(mine) == "".join(theirs)
        one += ["".join(mine)] if same else mine
        other += ["".join(theirs)] if same else theirs
    return one, other

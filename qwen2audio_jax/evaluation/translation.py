"""Scores of translations and captions: BLEU and chrF++, by sacrebleu, with its signatures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen2audio_jax.evaluation.extra import import_extra

TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "ja-mecab"}
"""Language -> sacrebleu's tokenizer; of all others 13a, as in the published figures."""
REPLICATIONS = 1000
"""Of the bootstrap."""


@dataclass(frozen=True)
class TextScore:
    """A score of texts by sacrebleu.

    Attributes:
        score: 0..100.
        low: lower end of the 95 % interval by bootstrap; None for a single text.
        high: its upper end.
        signature: sacrebleu's.
    """

    score: float
    low: float | None
    high: float | None
    signature: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bleu(references: Sequence[Sequence[str]], said: Sequence[str], *, language: str) -> TextScore:
    """Corpus BLEU.

    Args:
        references: of each answer the texts of which each is right.
        said: the answers.
        language: of both; it chooses the tokenizer.

    Raises:
        ValueError: sacrebleu, or its tokenizer of the language, is not installed.
    """
    tokenizer = TOKENIZERS.get(language, "13a")
    if tokenizer == "ja-mecab":
        import_extra("MeCab")
        import_extra("ipadic")
    return _score(import_extra("sacrebleu.metrics").BLEU(tokenize=tokenizer), references, said)


def chrf(references: Sequence[Sequence[str]], said: Sequence[str]) -> TextScore:
    """Corpus chrF++: characters up to six, words up to two; arguments and errors as for `bleu`."""
    return _score(import_extra("sacrebleu.metrics").CHRF(word_order=2), references, said)


def _score(metric: Any, references: Sequence[Sequence[str]], said: Sequence[str]) -> TextScore:
    most = max(map(len, references), default=1)
    # As sacrebleu wants them: the first references of all answers, then the second ones, where there are any.
    streams = [[texts[place] if place < len(texts) else None for texts in references] for place in range(most)]
    several = len(said) > 1
    found = metric.corpus_score(list(said), streams, n_bootstrap=REPLICATIONS if several else 1)
    signature = str(metric.get_signature())
    told = json.loads(found.format(width=6, signature=signature, is_json=True))
    mean, half = told.get("confidence_mean"), told.get("confidence_var")
    return TextScore(
        score=float(found.score),
        low=None if mean is None else mean - half,
        high=None if mean is None else mean + half,
        signature=signature,
    )

"""The confusion matrix of a classification as a picture."""

import io
from collections.abc import Mapping
from typing import Any

from qwen2audio_jax.evaluation.classification import OTHER
from qwen2audio_jax.evaluation.extra import import_extra


def draw_confusion(details: Mapping[str, Any], *, title: str) -> bytes:
    """A PNG of counts, rows as expected and columns as answered; the last column is of answers that are no label.

    Args:
        details: of a score of classification: "labels" [n] and "matrix" [n][n + 1].
        title: above it.

    Raises:
        ValueError: matplotlib is not installed.
    """
    labels, matrix = [*details["labels"], OTHER], details["matrix"]
    if not any(row[-1] for row in matrix):
        labels, matrix = labels[:-1], [row[:-1] for row in matrix]
    size = 2.5 + 0.7 * len(labels)
    # A separate figure, without pyplot: neither a display nor the caller's figures are affected.
    figure = import_extra("matplotlib.figure").Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    most = max(map(max, matrix)) or 1
    axes.imshow([[count / (sum(row) or 1) for count in row] for row in matrix], cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(matrix)), labels[: len(matrix)])
    axes.set(xlabel="answered", ylabel="expected", title=title)
    for row, counts in enumerate(matrix):
        for column, count in enumerate(counts):
            dark = count > 0.5 * (sum(counts) or most)
            axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", metadata={"Software": None})
    return content.getvalue()

"""The loss curve of a run as a picture, from its `metrics.jsonl`."""

from os import PathLike
from pathlib import Path

from qwen2audio_jax.storage.write_whole import draft_of
from qwen2audio_jax.train.extra import import_extra
from qwen2audio_jax.train.metrics import read_metrics

CURVE = "loss.png"


def draw_curve(folder: str | PathLike[str]) -> Path:
    """Plot training loss, evaluation loss and, on a separate axis, learning rate over steps.

    Args:
        folder: a run's output folder.

    Returns:
        `loss.png` in the folder.

    Raises:
        ValueError: the folder holds no metrics, or matplotlib is not installed.
    """
    entries = read_metrics(folder)

    def points(kind: str, name: str) -> tuple[list[int], list[float]]:
        # A value that was not finite becomes a gap.
        found = [(entry["step"], entry[name]) for entry in entries if entry["kind"] == kind and name in entry]
        return [step for step, _ in found], [float("nan") if value is None else value for _, value in found]

    # A separate figure, without pyplot: neither a display nor the caller's figures are affected.
    figure = import_extra("matplotlib.figure").Figure(figsize=(9, 5), layout="constrained")
    losses = figure.subplots()
    rates = losses.twinx()
    curves = [
        *losses.plot(*points("train", "loss"), color="tab:blue", linewidth=1, label="training loss"),
        *losses.plot(*points("evaluate", "loss"), color="tab:orange", marker="o", label="evaluation loss"),
        *rates.plot(*points("train", "learning_rate"), color="tab:gray", linestyle=":", label="learning rate"),
    ]
    losses.set(xlabel="step", ylabel="loss")
    rates.set_ylabel("learning rate")
    losses.grid(alpha=0.3)
    losses.legend(handles=[curve for curve in curves if len(curve.get_xdata())], loc="upper right")
    path = Path(folder) / CURVE
    with draft_of(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    return path

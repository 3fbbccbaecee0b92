"""Settings of a training run as dataclasses: one for each table of the TOML file, with the defaults."""

import typing
from dataclasses import dataclass, field

PARTS = ("encoder", "projector", "decoder", "head")
"""The trainable parts: `head` is the language-model head, `decoder` the rest of the decoder with its embeddings."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """[data]: the records, and their batching.

    Attributes:
        train: JSONL files.
        evaluate: JSONL files that are never trained on.
        audio_root: base folder of relative audio paths; default: the folder of the JSONL file that names them.
        on_bad_record: "stop" the run, or "skip" the record and count it.
        rows: rows of one optimiser step, over all processes and all micro-batches.
        max_tokens: width of a row; a record with more is a bad record.
        max_clips: clips in one row; a record with more is a bad record.
        packing: several records in a row, which do not attend to each other.
        frames: the mel frames (10 ms each) that clips are padded to; a batch uses the smallest that fits its longest.
        short_first: number of epochs that go from short clips to long ones instead of being shuffled.
        workers: processes that read audio in the background; 0 reads in threads.
    """

    train: tuple[str, ...]
    evaluate: tuple[str, ...] = ()
    audio_root: str | None = None
    on_bad_record: typing.Literal["stop", "skip"] = "stop"
    rows: int = 8
    max_tokens: int = 2048
    max_clips: int = 8
    packing: bool = True
    frames: tuple[int, ...] = (100, 200, 300, 500, 800, 1000, 1500, 2000, 3000)
    short_first: int = 0
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """[augment]: augmentation of training clips, off by default. Drawn anew for every record in every epoch.

    Attributes:
        gain_db: (minimum, maximum) gain.
        noise_snr_db: (minimum, maximum) level of the speech over added noise.
        noise_probability: share of clips that get noise.
        time_masks: SpecAugment masks over time, each up to `time_mask_frames` long.
        time_mask_frames: in mel frames of 10 ms.
        mel_masks: SpecAugment masks over mel bins, each up to `mel_mask_bins` high.
        mel_mask_bins: in mel bins.
    """

    gain_db: tuple[float, float] | None = None
    noise_snr_db: tuple[float, float] = (5.0, 30.0)
    noise_probability: float = 0.0
    time_masks: int = 0
    time_mask_frames: int = 20
    mel_masks: int = 0
    mel_mask_bins: int = 16


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """[objective]: the training objective.

    Attributes:
        kind: "sft" (cross-entropy of the answers) or "dpo" (preference of chosen over rejected answers).
        beta: DPO's strength of the pull towards the reference.
        label_smoothing: share of preferences that DPO assumes to be swapped.
    """

    kind: typing.Literal["sft", "dpo"] = "sft"
    beta: float = 0.1
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """[lora]: train low-rank additions to linear layers instead of the layers.

    Attributes:
        rank: r.
        alpha: the addition is scaled by alpha / rank.
        dropout: of the addition's input.
        targets: names of linear layers, such as "q_proj" or "decoder.q_proj", parts, such as "decoder", or
            "all-linear": all but the head, which is "lm_head".
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """[optimizer]: an optax optimiser and schedule by name.

    Attributes:
        name: "adamw", "adam", "lion", "muon", "adafactor" or "sgd".
        learning_rate: the schedule's peak.
        schedule: "constant", "linear", "cosine" or "wsd" (constant, then linear down over the last `decay_share`).
        warmup_steps: linear rise from 0.
        final_share: of the learning rate, at the last step.
        decay_share: of all steps; "wsd" only.
        weight_decay: decoupled.
        decay: "all" weights, or only "kernels" (no biases, norms and embeddings).
        betas: of the moments.
        eps: of the update's denominator.
        clip_norm: largest global norm of the gradient; 0 does not clip.
    """

    name: typing.Literal["adamw", "adam", "lion", "muon", "adafactor", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    schedule: typing.Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    final_share: float = 0.0
    decay_share: float = 0.2
    weight_decay: float = 0.01
    decay: typing.Literal["all", "kernels"] = "kernels"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """[machine]: mesh, dtype and memory options of the step.

    Attributes:
        data: mesh axis; -1 takes all devices that `model` leaves. Fewer than available: the first ones.
        model: mesh axis: devices that share one copy of the decoder.
        fsdp: split weights and optimiser state over `data` as well.
        dtype: of the computation; trained weights and optimiser state are always float32.
        remat: rematerialisation in the backward pass: "none", "dots" (all but products with weights) or "layers".
        accumulation: micro-batches per step.
    """

    data: int = -1
    model: int = 1
    fsdp: bool = True
    dtype: typing.Literal["float32", "bfloat16"] = "bfloat16"
    remat: typing.Literal["none", "dots", "layers"] = "layers"
    accumulation: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a whole run.

    Attributes:
        model: checkpoint to start from (Orbax or Hugging Face folder, or hub id); or a folder with config.json and the
            processor's files and no weights, together with `from_scratch`.
        output: folder of checkpoints, metrics and the exported result; a run in it is continued.
        steps: optimiser steps.
        from_scratch: start from randomly initialised weights.
        seed: of all random numbers.
        train: parts to train, some of `PARTS`; ignored with [lora].
        log_every: steps between lines of metrics.
        evaluate_every: steps between evaluations; 0: only at the end.
        save_every: steps between checkpoints.
        keep: number of newest checkpoints that are kept.
    """

    model: str
    output: str
    steps: int
    data: DataSettings
    from_scratch: bool = False
    seed: int = 0
    train: tuple[str, ...] = PARTS
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 500
    keep: int = 2
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    lora: LoraSettings | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)


def check_settings(settings: TrainSettings, *, where: str = "settings") -> None:
    """Raise a ValueError for invalid values."""
    data, machine, optimizer = settings.data, settings.machine, settings.optimizer
    if "://" in settings.output:
        raise ValueError(
            f"{where}: output = {settings.output} is a URL, and a run writes into a folder of this machine: name one, "
            "and copy it when the run is done"
        )
    for name, paths in (("train", data.train), ("evaluate", data.evaluate), ("audio_root", [data.audio_root or ""])):
        if found := next((path for path in paths if "://" in path), None):
            raise ValueError(
                f"{where}: data.{name} = {found} is a URL, and records are read from this machine: copy them here, and "
                "name the copy"
            )
    positive = {
        "steps": settings.steps,
        "log_every": settings.log_every,
        "save_every": settings.save_every,
        "keep": settings.keep,
        "data.rows": data.rows,
        "data.max_tokens": data.max_tokens,
        "data.max_clips": data.max_clips,
        "machine.accumulation": machine.accumulation,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.eps": optimizer.eps,
        "objective.beta": settings.objective.beta,
    }
    if settings.lora is not None:
        positive |= {"lora.rank": settings.lora.rank, "lora.alpha": settings.lora.alpha}
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{where}: {name} = {value}, but it must be above 0")
    shares = {
        "augment.noise_probability": settings.augment.noise_probability,
        "optimizer.final_share": optimizer.final_share,
        "optimizer.decay_share": optimizer.decay_share,
        "lora.dropout": settings.lora.dropout if settings.lora else 0.0,
    }
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{where}: {name} = {value}, but it must be from 0 to 1")
    if not 0 <= (smoothing := settings.objective.label_smoothing) < 0.5:
        raise ValueError(f"{where}: objective.label_smoothing = {smoothing}, but it must be from 0 to below 0.5")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ValueError(f"{where}: optimizer.betas = {list(optimizer.betas)}, but both must be from 0 to below 1")
    if not data.train:
        raise ValueError(f"{where}: data.train names no file")
    if data.rows % machine.accumulation:
        raise ValueError(
            f"{where}: data.rows = {data.rows} does not divide into machine.accumulation = {machine.accumulation} "
            "micro-batches; choose a multiple"
        )
    if any(frames < 2 or frames % 2 for frames in data.frames):
        raise ValueError(f"{where}: data.frames = {list(data.frames)}, but they must be even")
    for name in ("gain_db", "noise_snr_db"):
        span = getattr(settings.augment, name)
        if span is not None and span[0] > span[1]:
            raise ValueError(f"{where}: augment.{name} = {list(span)}: the least comes first")

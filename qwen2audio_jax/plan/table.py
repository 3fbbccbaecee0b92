"""Text table of a plan, from its report."""

from collections.abc import Mapping
from typing import Any

from qwen2audio_jax.plan.compiling import GIB


def _gib(value: int | None) -> str:
    if value is None:
        return "?"
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value * 1024 / GIB:.2f} MiB"


def _rows(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{name:34}{value}" for name, value in pairs]


def _seconds(value: float) -> str:
    return f"{1e3 * value:.2f} ms" if value < 1 else f"{value:.2f} s"


def _exchanges(collectives: Mapping[str, Mapping[str, int]]) -> str:
    found = [f"{one['count']} {kind} of {one['bytes'] / 2**20:.2f} MiB" for kind, one in collectives.items()]
    return ", ".join(found) or "none"


def _refused(refusal: Mapping[str, Any]) -> str:
    needs = "" if refusal["needed"] is None else f", which takes {_gib(refusal['needed'])} a chip"
    return f"{refusal['rows']} rows do not fit in {refusal['stage']}{needs}"


def _verdict(report: Mapping[str, Any]) -> str:
    if report["fits"]:
        return f"fits: {_gib(report['peak_bytes_per_chip'])} of the {_gib(report['limit_bytes_per_chip'])} of a chip"
    return f"does not fit: {_refused(report['refusal'])} of {_gib(report['limit_bytes_per_chip'])}"


def _largest(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if report["largest_batch"] is None:
        return [("largest batch", "not searched for")]
    above = _refused(report["next_batch"]) if report["next_batch"] else "beyond what is planned for"
    return [("largest batch", str(report["largest_batch"])), ("next batch", above)]


def _how(report: Mapping[str, Any]) -> str:
    if report["by"] == "arithmetic":
        return "by arithmetic, nothing compiled"
    return "compiled, " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())


def inference_table(report: Mapping[str, Any]) -> str:
    """The text that `qwen2audio plan` prints, from `report.report`."""
    mesh, shapes, chip = report["mesh"], report["shapes"], report["chip"]
    positions = f"{shapes['tokens']} prompt tokens, cache of {shapes['capacity']} positions"
    heard = f" with a clip of {report['clip_seconds']:g} s" if report["clip_seconds"] else ""
    prompt, new = f"{report['prompt_tokens']} prompt tokens{heard}", f"{report['max_new_tokens']} new ones"
    lines = [
        f"{report['config']} on {report['topology']}, mesh data={mesh['data']} model={mesh['model']} ({_how(report)})",
        f"{report['batch']} rows: {prompt} and {new}",
        f"padded to {shapes['rows']} rows, {positions}, {shapes['clips']} clips of {shapes['frames']} frames",
        f"weights {report['weights']}, cache {report['cache']}, {report['mode']}; {report['attention']} attention over "
        "prompts and clips",
        "",
        _verdict(report),
        "",
        *_rows(
            [
                ("weights a chip", _gib(report["weights_bytes_per_chip"])),
                ("cache a chip", _gib(report["cache_bytes_per_chip"])),
                *_largest(report),
            ]
        ),
    ]
    for name, stage in report["stages"].items():
        of = stage["least_seconds_of"]
        lines += [
            "",
            name,
            *_rows(
                [
                    ("  temporaries a chip", _gib(stage["temporary_bytes_per_chip"])),
                    ("  peak a chip", _gib(stage["peak_bytes_per_chip"])),
                    ("  exchanges", _exchanges(stage["collectives"])),
                    ("  sent by a chip", f"{stage['sent_bytes_per_chip'] / 2**20:.2f} MiB"),
                    ("  computed by a chip", f"{stage['flops_per_chip'] / 1e9:.1f} GFLOP"),
                    ("  read by a chip", _gib(stage["bytes_per_chip"])),
                    (
                        "  least time",
                        f"{_seconds(stage['least_seconds'])} (products {_seconds(of['compute'])}, memory "
                        f"{_seconds(of['memory'])}, exchanges {_seconds(of['communication'])})",
                    ),
                ]
            ),
        ]
    if rates := report["roofline"]:
        lines += [
            "",
            *_rows(
                [
                    ("tokens/s at best", f"{rates['tokens_per_second']:.0f}"),
                    ("clips/s at best", f"{rates['clips_per_second']:.2f}"),
                ]
            ),
        ]
    if speech := report["transcription"]:
        lines += _rows(
            [
                (f"clips of {speech['clip_seconds']:g} s, {speech['new_tokens']} new", ""),
                ("  times real time at best", f"{speech['times_real_time_at_most']:.0f}"),
                (f"  at {speech['reached_share_of_roofline']:.0%} of it", f"{speech['times_real_time']:.0f}"),
            ]
        )
    if job := report.get("job"):
        lines += _rows(
            [
                (f"{job['clips']} clips of {job['mean_seconds']:g} s", f"{job['batches']} batches"),
                ("  chip-hours at best", f"{job['chip_hours_at_least']:.2f}"),
                (f"  at {job['reached_share_of_roofline']:.0%} of it", f"{job['chip_hours']:.2f}"),
            ]
        )
    rate = f"{chip['bf16_flops'] / 1e12:.0f} bf16 TFLOP/s, {chip['int8_ops'] / 1e12:.0f} int8 TOP/s"
    lines += [
        "",
        "Assumed:",
        f"- a {chip['name']} has {chip['hbm_bandwidth'] / 1e9:.0f} GB/s of memory, {rate}, and a link of "
        f"{chip['link_bandwidth'] / 1e9:.0f} GB/s ({chip['source']})",
        *(f"- {assumption}" for assumption in report["assumptions"]),
    ]
    return "\n".join(lines) + "\n"


def training_table(report: Mapping[str, Any]) -> str:
    """The text that `qwen2audio plan --train` prints, from `training.plan_training`."""
    mesh, rows = report["mesh"], report["rows"]
    lines = [
        f"{report['config']} on {report['topology']}, mesh data={mesh['data']} model={mesh['model']}, "
        f"training {report['trains']} ({_how(report)})",
        f"a step of {rows} rows of {report['tokens']} tokens and {report['clips']} clips of {report['frames']} frames "
        f"each, in {report['accumulation']} micro-batches; recomputed: {report['remat']}",
        "",
        _verdict(report) if report["fits"] else f"does not fit: {report['reason']}",
        "",
        *_rows(
            [
                ("state a chip", _gib(report["state_bytes_per_chip"])),
                ("frozen weights a chip", _gib(report["frozen_bytes_per_chip"])),
                ("temporaries a chip", _gib(report["temporary_bytes_per_chip"])),
                ("peak a chip", _gib(report["peak_bytes_per_chip"])),
            ]
        ),
    ]
    return "\n".join(lines) + "\n"

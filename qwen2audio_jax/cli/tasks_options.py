"""Options of the commands that are tasks: transcribe, translate, caption, classify, ask and embed."""

import argparse

from qwen2audio_jax.cli.options import add_hotwords

TASK_COMMANDS = ("transcribe", "translate", "caption", "classify", "ask", "embed")
FORMATS = ("txt", "json", "srt", "vtt", "tsv")


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add the sounds."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a file, a URL, - for standard input, or example:NAME; each by itself"
    )


def add_transcribe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `transcribe`."""
    parser.add_argument("--language", metavar="CODE", help="of the speech: en (default), zh, yue, fr, it, es, de, ja")
    _add_long(parser)


def add_translate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `translate`."""
    parser.add_argument("--from", dest="source", metavar="CODE", default="zh", help="language of the speech (zh)")
    parser.add_argument("--to", dest="target", metavar="CODE", default="en", help="of the text: en, zh, de (en)")
    _add_long(parser)


def _add_long(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-format", choices=FORMATS, default="txt", help="(default: %(default)s); json has every figure"
    )
    group.add_argument("--output-dir", metavar="DIR", help="write a file for each there, and nothing to stdout")
    group = parser.add_argument_group("windows")
    group.add_argument(
        "--detector",
        choices=("energy", "silero", "none"),
        default="energy",
        help="of voice: by loudness (default), by a network (extra: vad), or none: all is heard",
    )
    group.add_argument("--window", type=float, metavar="SECONDS", help="longest window (default: as suits the model)")
    group.add_argument(
        "--retry",
        choices=("none", "loops", "all"),
        default="loops",
        help="ask again, drawing, where a text repeats itself (default), or is doubtful in any way",
    )
    add_hotwords(group)
    group.add_argument("--no-gate", action="store_true", help="do not ask the model whether there is speech")
    group.add_argument("--checks", metavar="FILE", help="thresholds, instead of those in configs/tasks-checks.toml")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn again (default: 0)")


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `caption`."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def add_classify_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `classify`."""
    parser.add_argument("--task", metavar="NAME", help="emotion, vocal_sound; of the embedded model sound_kind, voice")
    parser.add_argument("--labels", metavar="A,B,...", help="any labels, instead of the task's")
    parser.add_argument(
        "--score",
        choices=("raw", "length", "calibrated"),
        default="raw",
        help="log-likelihood (default), the same a token, or less that after silence of the same length",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every label's probability")


def add_ask_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ask`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--question", metavar="TEXT", help="any question")
    what.add_argument("--task", choices=("sound", "music"), help="a question of the package's")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def add_embed_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `embed`."""
    parser.add_argument("--output", metavar="FILE", required=True, help="file: .npz or .safetensors")
    parser.add_argument(
        "--layer",
        choices=("encoded", "projected"),
        default="encoded",
        help="the encoder's output (default), or the same in the decoder's width",
    )
    parser.add_argument("--pool", choices=("none", "mean"), default="none", help="mean: one vector for each file")


def add_hearing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of hearing sounds, which all have."""
    group = parser.add_argument_group("hearing")
    group.add_argument(
        "--allow-truncated", action="store_true", help="hear files that are shorter than they say, as far as they go"
    )
    group.add_argument("--track", type=int, metavar="N", help="audio track, from 0, of files that have several")


def add_kind_option(parser: argparse.ArgumentParser) -> None:
    """Add the kind of model."""
    parser.add_argument("--kind", choices=("base", "instruct", "embedded"), help="of model (default: by the model)")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine."""
    group = parser.add_argument_group("answering")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (default: the task's)")
    group.add_argument("--slots", type=int, metavar="N", help="windows or files at a time (default: what fits)")
    group.add_argument("--positions", type=int, metavar="N", help="most tokens of a prompt and its answer together")
    group.add_argument("--stats", action="store_true", help="say at the end on stderr how fast it was, as JSON")

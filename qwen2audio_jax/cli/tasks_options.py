"""Options of the commands that are tasks: transcribe, translate, caption, classify, ask and embed."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TASK_COMMANDS = ("transcribe", "translate", "caption", "classify", "ask", "embed")
TRANSCRIBE = """\
Transcribe sound of any length: cut at silence, windows answered side by side, silence and noise left out. The text goes
to stdout, or into a file for each sound in --output-dir. docs/tasks.md says what can be doubtful about it."""
TRANSLATE = "Translate speech of any length; see transcribe."
CAPTION = "Say in a sentence what can be heard."
CLASSIFY = """\
Say which label fits a clip best, by how probable the model finds each one after the prompt; no label is a word that it
has to say by itself."""
ASK = """\
Answer a question about a sound; without --question or --task the sound is the question (voice chat). What is longer
than 30 s is several clips of one prompt, as far as --positions allow."""
EMBED = "Write the audio features of sounds, one vector for 40 ms, into one file."
FORMATS = ("txt", "json", "srt", "vtt", "tsv")


def add_task_parsers(commands: Any, *, add_model_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands of tasks to the command line's."""
    for name, line, description in (
        ("transcribe", "speech to text, of any length", TRANSCRIBE),
        ("translate", "speech to text in another language", TRANSLATE),
        ("caption", "what can be heard", CAPTION),
        ("classify", "which label fits", CLASSIFY),
        ("ask", "a question about sounds", ASK),
        ("embed", "audio features", EMBED),
    ):
        parser = commands.add_parser(name, help=line, description=description)
        parser.add_argument(
            "files", nargs="+", metavar="FILE", help="a file, a URL, or example:NAME; each is answered by itself"
        )
        _ADD[name](parser)
        _add_common(parser, name)
        add_model_options(parser)


def hint(arguments: Sequence[str]) -> str | None:
    """What to say to somebody who gave a sound where a command belongs; None to everybody else."""
    if not arguments or arguments[0].startswith("-"):
        return None
    name = arguments[0]
    if not name.startswith("example:") and not Path(name).expanduser().is_file():
        return None
    return (
        f"{name} is a file, and no command: say what to do with it, as in qwen2audio transcribe {name} "
        f"(or {', '.join(TASK_COMMANDS[1:])})"
    )


def _add_transcribe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", metavar="CODE", help="of the speech: en (default), zh, yue, fr, it, es, de, ja")
    _add_long(parser)


def _add_translate(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument("--no-gate", action="store_true", help="do not ask the model whether there is speech")
    group.add_argument("--checks", metavar="FILE", help="thresholds, instead of those in configs/tasks-checks.toml")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn again (default: 0)")


def _add_caption(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", metavar="NAME", help="emotion, vocal_sound; of the embedded model sound_kind, voice")
    parser.add_argument("--labels", metavar="A,B,...", help="any labels, instead of the task's")
    parser.add_argument(
        "--score",
        choices=("raw", "length", "calibrated"),
        default="raw",
        help="log-likelihood (default), the same a token, or less that after silence of the same length",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every label's probability")


def _add_ask(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--question", metavar="TEXT", help="any question")
    what.add_argument("--task", choices=("sound", "music"), help="a question of the package's")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", required=True, help="file: .npz or .safetensors")
    parser.add_argument(
        "--layer",
        choices=("encoded", "projected"),
        default="encoded",
        help="the encoder's output (default), or the same in the decoder's width",
    )
    parser.add_argument("--pool", choices=("none", "mean"), default="none", help="mean: one vector for each file")


def _add_common(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("hearing and speed")
    group.add_argument(
        "--allow-truncated", action="store_true", help="hear files that are shorter than they say, as far as they go"
    )
    group.add_argument("--track", type=int, metavar="N", help="audio track, from 0, of files that have several")
    if name == "embed":
        return
    group.add_argument("--kind", choices=("base", "instruct", "embedded"), help="of model (default: by the model)")
    if name == "classify":
        return
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (default: the task's)")
    group.add_argument("--slots", type=int, metavar="N", help="windows or files at a time (default: what fits)")
    group.add_argument("--positions", type=int, metavar="N", help="most tokens of a prompt and its answer together")
    group.add_argument("--stats", action="store_true", help="say at the end on stderr how fast it was, as JSON")


_ADD = {
    "transcribe": _add_transcribe,
    "translate": _add_translate,
    "caption": _add_caption,
    "classify": _add_classify,
    "ask": _add_ask,
    "embed": _add_embed,
}

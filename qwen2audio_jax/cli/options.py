"""Command-line options that several commands share, and their translation to library arguments.

Values are checked by the library, whose messages name value, limit and remedy.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from qwen2audio_jax.command_line import nearest
from qwen2audio_jax.embedded import EMBEDDED, examples
from qwen2audio_jax.parallel.mesh_presets import mesh_preset_names

DEFAULT_MODEL = EMBEDDED
"""The default of --model."""

DEFAULT_NEW_TOKENS = 512
"""Default limit of new tokens if neither options nor checkpoint set one: the library's 20 would cut most answers."""

_GENERATION = (
    ("--min-new-tokens", int, "N", "fewest tokens before the answer may end"),
    ("--temperature", float, "T", "flatten (above 1) or sharpen the distribution; sampling only"),
    ("--top-k", int, "K", "draw from the K most probable tokens, 0 for all; sampling only"),
    ("--top-p", float, "P", "draw from the fewest tokens that reach this probability; sampling only"),
    ("--min-p", float, "P", "draw from tokens of at least this share of the best one's probability; sampling only"),
    ("--no-repeat-ngram-size", int, "N", "no N tokens in a row come twice in prompt and answer"),
    ("--max-time", float, "SECONDS", "end the answer after so long"),
    ("--repetition-penalty", float, "R", "above 1: what stands in prompt or answer becomes less probable"),
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model: source, storage and devices."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="DIR",
        default=DEFAULT_MODEL,
        help="converted checkpoint, Hugging Face folder, or hub id (extra: hub); the latter two are converted once "
        "(default: the small model that comes with the package, for demonstration)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--adapter", metavar="DIR", help="LoRA adapter in PEFT's format, added to the model's weights")
    group.add_argument("--cache-dir", metavar="DIR", help="where conversions are kept")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the computation (default: auto, as stored)",
    )
    group.add_argument(
        "--weights",
        default="auto",
        choices=("auto", "int8"),
        help="int8: the decoder's are quantised while they are read (default: auto, as stored)",
    )
    group.add_argument(
        "--cache",
        default="auto",
        choices=("auto", "int8"),
        help="of keys and values (default: auto, in the compute dtype)",
    )
    group.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "xla", "cudnn", "pallas"),
        help="over whole prompts and clips: cudnn is for NVIDIA GPUs, pallas for TPUs (default: auto, by devices and "
        "dtype)",
    )
    group.add_argument(
        "--mesh",
        metavar="DATAxMODEL",
        help="split over devices, as in 2x4, or data=N,model=M,num_slices=S; or a machine by name, with its dtype "
        f"unless --dtype says another: {', '.join(mesh_preset_names())} (default: the first device alone)",
    )


def add_process_options(parser: argparse.ArgumentParser, *, of: str = "") -> None:
    """Add the options of multi-process runs; without them the cluster environment decides.

    Args:
        parser: of the command; one that has a --peer-timeout already keeps it.
        of: another option that they need.
    """
    group = parser.add_argument_group(
        f"several processes{of and f', with {of}'}",
        "the same command on every host; TPU pods, Slurm, Open MPI and Kubernetes jobs need none of these",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0's host, and a free port on it")
    group.add_argument("--process-id", type=int, metavar="I", help="this process, from 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are; 1: alone, whatever is found")
    if parser.get_default("peer_timeout") is None:
        group.add_argument(
            "--peer-timeout", type=float, metavar="SECONDS", help="how long to wait for the others (default: 300)"
        )


def add_input_options(parser: argparse.ArgumentParser, *, single_prompt: bool) -> None:
    """Add the options of the model's inputs."""
    group = parser.add_argument_group("input")
    if single_prompt:
        names = ", ".join(path.stem for path in examples())
        group.add_argument(
            "--audio",
            metavar="FILE",
            action="append",
            default=[],
            help="a clip (a file, a URL, or - for standard input); may be given again; "
            f"example:NAME is one of the package's: {names}",
        )
        group.add_argument(
            "--each",
            metavar="FILE",
            nargs="+",
            default=[],
            help="clips of which each is asked about by itself, an answer a line; several at a time",
        )
        group.add_argument(
            "--raw", action="store_true", help="use the prompt as it is, without the chat template (base models)"
        )
    group.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's)")
    add_clip_options(group)
    group.add_argument("--allow-special", action="store_true", help="let messages write control tokens")


def add_clip_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of loading clips."""
    group.add_argument("--truncation", action="store_true", help="cut clips that are too long instead of refusing them")
    group.add_argument(
        "--allow-truncated",
        action="store_true",
        help="hear files that are shorter than they say, as far as they go, instead of refusing them",
    )
    group.add_argument("--track", type=int, metavar="N", help="audio track, from 0, of files that have several")
    group.add_argument(
        "--allow-private-urls", action="store_true", help="fetch clips from addresses that are not public too"
    )


def clip_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of them, as `load_audio` takes it."""
    names = ("truncation", "allow_truncated", "track", "allow_private_urls")
    return {name: getattr(options, name) for name in names}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of generation, whose defaults are the checkpoint's."""
    group = parser.add_argument_group("generation", "defaults: the checkpoint's generation_config.json")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"most tokens of the answer (default: the checkpoint's, else {DEFAULT_NEW_TOKENS})",
    )
    length.add_argument("--max-length", type=int, metavar="N", help="most tokens of prompt and answer together")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--do-sample", action="store_const", const=True, help="draw each token")
    mode.add_argument(
        "--greedy", dest="do_sample", action="store_const", const=False, help="take the most probable token"
    )
    for name, kind, metavar, text in _GENERATION:
        group.add_argument(name, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop", metavar="TEXT", action="append", help="end the answer after this text; may be given again"
    )
    group.add_argument(
        "--choice",
        metavar="TEXT",
        action="append",
        help="the answer is this text, or another one given so (extra: grammars)",
    )
    group.add_argument("--regex", metavar="REGEX", help="the answer matches it as a whole (extra: grammars)")
    group.add_argument(
        "--json-schema", metavar="FILE", help="the answer is JSON of the schema in this file (extra: grammars)"
    )
    add_hotwords(group)
    group.add_argument("--seed", type=int, metavar="S", help="same seed, same draws (default: a new one each time)")


def add_hotwords(group: argparse._ActionsContainer) -> None:
    """Add --hotwords and --hotword-bonus."""
    group.add_argument(
        "--hotwords",
        metavar="FILE_OR_LIST",
        help="words that are expected, preferred where the sound is unclear: a file with one a line, or A,B,C",
    )
    group.add_argument(
        "--hotword-bonus",
        type=float,
        metavar="X",
        help="what each of their tokens has more, in units of log-probability (docs/tasks.md)",
    )


def hotword_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of them, as options of generation.

    Raises:
        ValueError: the file cannot be read.
    """
    found: dict[str, Any] = {}
    if options.hotwords is not None:
        found["hotwords"] = _read_hotwords(options.hotwords)
    if options.hotword_bonus is not None:
        found["hotword_bonus"] = options.hotword_bonus
    return found


def _read_hotwords(text: str) -> list[str]:
    """The words in a file, or between commas."""
    try:
        is_file = Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, say
        is_file = False
    if is_file:
        lines = _read_text("--hotwords", text, what="one word a line").splitlines()
    elif "," not in text and ("/" in text or text.endswith(".txt")):
        raise ValueError(f"--hotwords {text}: there is no such file, and it is no list; write one as in A,B,C")
    else:
        lines = text.split(",")
    return [line.strip() for line in lines if line.strip()]


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """Add --profile."""
    parser.add_argument("--profile", metavar="DIR", help="write a trace of the computation there (jax.profiler)")


def add_output_options(parser: argparse.ArgumentParser, *, single_prompt: bool) -> None:
    """Add the options of the output."""
    group = parser.add_argument_group("output")
    said = "text, finish_reason, tokens"
    if single_prompt:
        said = "text, ids, finish_reason, tokens, mean_log_prob, prompt_tokens"
        group.add_argument(
            "--num-return-sequences", type=int, metavar="N", help="N answers, one after the other; sampling only"
        )
    group.add_argument("--json", action="store_true", help=f"one JSON object a line for each answer: {said}")
    group.add_argument(
        "--stats",
        action="store_true",
        help="figures of each answer: seconds to the first token, tokens a second, times real time; on stderr, with "
        "--json as stats in the object",
    )
    add_quiet(group)


def add_quiet(group: argparse._ActionsContainer) -> None:
    """Add --quiet."""
    group.add_argument("--quiet", action="store_true", help="answers and errors alone: no notes and no progress")


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """The given generation options as keyword arguments of `generate`."""
    names = ["max_new_tokens", "max_length", "do_sample", "num_return_sequences"]
    names += [name[2:].replace("-", "_") for name, *_ in _GENERATION]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if options.stop:
        given["stop_strings"] = options.stop
    if options.choice:
        given["choices"] = options.choice
    if options.regex is not None:
        given["regex"] = options.regex
    if options.json_schema is not None:
        given["json_schema"] = _read_text("--json-schema", options.json_schema, what="a JSON schema")
    return {**given, **hotword_options(options)}


def _read_text(option: str, name: str, *, what: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8"
        raise ValueError(f"{option} {name} cannot be read ({reason}): give a file with {what}") from None


def mesh_arguments(text: str) -> dict[str, Any]:
    """The arguments of `make_mesh` from "2x4", "data=2,model=4" or the name of a preset.

    Raises:
        ValueError: the text has another form.
    """
    if text in mesh_preset_names():
        return {"preset": text}
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        return {"data": int(found[1]), "model": int(found[2])}
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ("data", "model", "num_slices") or name in sizes or not size.isdecimal():
            raise ValueError(
                f"--mesh {text!r}: {part!r} is none of data=N, model=N and num_slices=N; write it as in --mesh 2x4 or "
                f"--mesh data=2,model=4, or name one of {', '.join(mesh_preset_names())}"
                f"{nearest(text, mesh_preset_names())}"
            )
        sizes[name] = int(size)
    return sizes

"""Command-line options of one command each."""

import argparse

from qwen2audio_jax.cli.options import add_clip_options, add_quiet


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the prompt of `generate`."""
    parser.add_argument("prompt", nargs="?", help="the text; - reads it from stdin, without its last line break")


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `batch`; those of the model and of generation are added like those of `generate`."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="JSONL (also .gz), a tar in WebDataset's layout, a folder of sound files, a pattern, a bucket's URL, or - "
        "for JSONL on stdin",
    )
    group = parser.add_argument_group("job")
    group.add_argument("--output", metavar="DIR", required=True, help="folder or bucket URL of the answers")
    group.add_argument("--prompt", metavar="TEXT", help="of records that state none (default: the clip is the message)")
    group.add_argument(
        "--task", metavar="NAME", help="instead of --prompt: transcribe, translate, caption, emotion, vocal_sound, ..."
    )
    group.add_argument(
        "--language", metavar="CODE", help="of the task: en, zh, ...; of a translation zh-en, en-de, ..."
    )
    group.add_argument("--kind", choices=("base", "instruct", "embedded"), help="of model (default: by the model)")
    group.add_argument(
        "--long",
        action="store_true",
        help="sound of any length, cut at silence: for the tasks transcribe and translate; rows have segments",
    )
    group.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's)")
    group.add_argument("--merge", metavar="FILE", help="when all is done write all rows there, in input order")
    group.add_argument(
        "--shard", metavar="I/N", help="this is host I of N, from 0 (default: the scheduler's variables, else alone)"
    )
    group.add_argument(
        "--peer-timeout",
        type=float,
        metavar="SECONDS",
        default=300.0,
        help="wait so long for a trace of the other hosts in the folder (default: %(default)g); 0: do not take over "
        "their shards",
    )
    group.add_argument(
        "--mesh-across-hosts",
        action="store_true",
        help="one model over the devices of all hosts, for models that one host cannot hold; needs --mesh",
    )
    group.add_argument("--slots", type=int, metavar="N", help="prompts at a time (default: what fits; 8 on a CPU)")
    group.add_argument(
        "--positions", type=int, metavar="N", help="most tokens of a prompt and its answer together (default: 2048)"
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="let actors of a Ray cluster answer (extra: ray; default address: RAY_ADDRESS, or this machine)",
    )
    group.add_argument("--ray-actors", type=int, metavar="N", default=1, help="models on Ray (default: %(default)s)")
    group.add_argument(
        "--ray-resources", metavar="NAME=N,...", help="what each takes, as in TPU=4 or GPU=1 (default: nothing)"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", default=2, help="processes that load clips (default: %(default)s)"
    )
    group.add_argument("--max-errors", type=int, metavar="N", help="stop after more errors than that (default: never)")
    group.add_argument(
        "--retry-suspect", action="store_true", help="ask once more, drawing, where an answer is suspect"
    )
    group.add_argument(
        "--retry-errors",
        action="store_true",
        help="answer records of this host's finished shards again that have errors",
    )
    group.add_argument("--suspect", metavar="FILE", help="thresholds, instead of those in configs/batch-suspect.toml")
    group.add_argument("--token-ids", action="store_true", help="put the answers' token ids into the rows")
    add_clip_options(group)
    group.add_argument("--allow-special", action="store_true", help="let messages write control tokens")
    group.add_argument("--metrics", metavar="FILE", help="figures: JSON lines if it ends with .jsonl, else Prometheus'")
    group.add_argument("--dry-run", action="store_true", help="count, listen to some records, and answer nothing")
    group.add_argument("--json", action="store_true", help="(the summary is one JSON object in any case)")
    add_quiet(group)


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="training configuration: a TOML file")
    parser.add_argument(
        "--convert-records",
        metavar=("FILE", "JSONL"),
        nargs=2,
        help="train nothing: write the records of a file of ms-swift's, LLaMA-Factory's or TRL's (or ours) as ours",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="use this value instead of the file's, as in --set data.rows=16; may be given again",
    )
    parser.add_argument("--output", metavar="DIR", help="output folder, instead of the file's")
    parser.add_argument("--json", action="store_true", help="say where the run stands as one JSON object on stdout")
    add_quiet(parser)


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.add_argument(
        "task",
        metavar="TASK",
        nargs="?",
        help="transcribe, translate, caption, emotion, vocal_sound, choose, sound, music, ask, voice_chat; without one "
        "the model inside is scored on spoken digits",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--manifest", metavar="FILE", nargs="+", help="JSONL: records of a batch job with what is expected"
    )
    group.add_argument(
        "--layout",
        metavar="NAME",
        help="read the data set in --data as it was published: librispeech, common-voice, fleurs, aishell-2, covost2, "
        "meld, vocalsound, air-bench-chat, air-bench-foundation, mmau",
    )
    group.add_argument(
        "--data",
        metavar="DIR",
        help="folder of --layout; without a task one with records.jsonl, as python -m qwen2audio_jax.speech writes",
    )
    group.add_argument("--fresh", type=int, metavar="N", help="synthesise N examples first (needs espeak-ng)")
    group.add_argument("--seed", type=int, metavar="S", help="of --fresh (default: 0)")
    group.add_argument(
        "--split",
        metavar="NAME",
        help="part of --layout; voices of --fresh: test, as in training (default), or unseen, never heard",
    )
    group.add_argument("--batch", type=int, default=16, metavar="N", help="digits: examples at a time (default: 16)")
    _add_scoring(parser)
    _add_evaluation_job(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_quiet(parser)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring of a task")
    group.add_argument(
        "--language", metavar="CODE", help="en, zh, ...; of a translation zh-en, en-de, ... (default: the records')"
    )
    group.add_argument("--kind", choices=("base", "instruct", "embedded"), help="of model (default: by the model)")
    group.add_argument("--labels", metavar="A,B,...", help="of a classification, instead of the task's")
    group.add_argument(
        "--questions",
        choices=("plain", "letters"),
        default="plain",
        help="how choices are put: plain (default), or with letters, in AIR-Bench's words",
    )
    group.add_argument(
        "--label-score",
        choices=("raw", "length", "calibrated", "none"),
        default="raw",
        help="of labels and choices, as in classify --score; none: what is said is scored alone",
    )
    group.add_argument("--published", metavar="NAME", help="compare with these figures of configs/published.toml")


def _add_evaluation_job(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("job of a task", "as of batch: the same command goes on where it was stopped")
    group.add_argument("--output", metavar="DIR", help="folder or bucket URL of the answers and the report")
    group.add_argument("--shard", metavar="I/N", help="this host's place, from 0; the report is made when all are done")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (default: the task's)")
    group.add_argument("--min-new-tokens", type=int, metavar="N", help="fewest tokens before it may end")
    group.add_argument("--slots", type=int, metavar="N", help="prompts at a time (default: what fits)")
    group.add_argument("--positions", type=int, metavar="N", help="most tokens of a prompt and its answer together")
    group.add_argument("--workers", type=int, metavar="N", default=2, help="processes that load clips (default: 2)")
    group.add_argument("--max-errors", type=int, metavar="N", help="stop after more errors than that (default: never)")
    group.add_argument("--retry-errors", action="store_true", help="answer records again that have errors")
    group.add_argument("--dry-run", action="store_true", help="check the manifest, listen to some records, and stop")
    add_clip_options(group)


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="check this converted checkpoint, Hugging Face folder, or hub id, and not the machine",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--cache-dir", metavar="DIR", help="where conversions are kept")
    parser.add_argument(
        "--glass-clip",
        metavar="FILE",
        help="the documentation's glass-breaking-151256.mp3, of which the base model is known to say "
        '"Glass is breaking.": answers it and compares',
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="compute each stage of the embedded model on the default device, compare it with the CPU, and time it",
    )
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object")
    add_quiet(parser)


def add_models_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `models`."""
    parser.add_argument("--cache-dir", metavar="DIR", help="where conversions are kept")
    parser.add_argument("--remove", metavar="NAME", nargs="+", default=[], help="remove these entries")
    parser.add_argument(
        "--clean", action="store_true", help="remove unfinished entries, and earlier states that nothing needs"
    )
    parser.add_argument("--json", action="store_true", help="the entries as one JSON object")
    add_quiet(parser)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default="qwen2-audio-7b",
        help="config.json, or the name of a configuration that comes with the package (default: %(default)s)",
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="the machine: a TPU slice such as v5e:2x4, v6e:2x4 or v5p:2x2x1, or GPUs such as h100x8",
    )
    parser.add_argument(
        "--mesh",
        metavar="MESH",
        help="over its chips, as in 2x4 or v5e-8 (default: one copy of the decoder, where it divides)",
    )
    group = parser.add_argument_group("generating")
    group.add_argument("--batch", type=int, metavar="B", default=8, help="rows (default: %(default)s)")
    group.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="P",
        default=780,
        help="of a prompt, its clip's 25 a second included (default: %(default)s, a clip of 30 s)",
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", default=244, help="default: %(default)s")
    group.add_argument("--weights", metavar="DTYPE", default="bfloat16", help="or int8, ... (default: %(default)s)")
    group.add_argument("--cache", metavar="DTYPE", help="of keys and values: int8, or (the default) the computation's")
    group.add_argument("--do-sample", action="store_true", help="tokens are drawn, not the most probable ones taken")
    group.add_argument("--no-search", action="store_true", help="measure B rows alone, and look for no larger batch")
    group.add_argument("--clips", type=int, metavar="N", help="also say how many chip-hours so many clips take")
    group.add_argument("--mean-seconds", type=float, metavar="S", help="of these clips")
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train",
        metavar="CONFIG",
        help="plan for training: a training configuration (TOML), full (all weights), or lora (its defaults); of the "
        "last two a step has B rows of P + N tokens",
    )
    parser.add_argument("--memory-gib", type=float, metavar="G", help="use no more of a chip than this (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_quiet(parser)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `serve`; those of the model are added apart."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="(default: %(default)s)")
    group.add_argument("--name", metavar="NAME", help="the model's name in the protocol (default: its folder's)")
    group.add_argument("--api-key-file", metavar="FILE", help="keys, one a line, of which a client must send one")
    group.add_argument("--no-auth", action="store_true", help="let everybody in who reaches another --host")
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="let another site's pages ask (repeatable)"
    )
    group.add_argument("--allow-private-urls", action="store_true", help="fetch clips from private addresses too")
    group.add_argument("--max-body", type=int, default=64, metavar="MiB", help="largest request (default: %(default)s)")
    group = parser.add_argument_group("engine")
    group.add_argument("--slots", type=int, metavar="N", help="prompts at a time (default: what fits; 8 on a CPU)")
    group.add_argument("--positions", type=int, metavar="N", help="most tokens of prompt and answer (default: 2048)")
    group.add_argument("--queue", type=int, metavar="N", help="requests that may wait (default: 4 for each slot)")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="processes that load clips (default: 2)")
    group.add_argument("--truncation", action="store_true", help="cut clips that are too long instead of refusing them")
    group.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        help="compile for prompts of up to N tokens before the first request; 0: when they come (default: 1024; of the "
        "demonstration model 384)",
    )
    add_quiet(group)

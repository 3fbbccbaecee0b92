"""The commands of `qwen2audio` as a table: what each says about itself, its options, and where it runs.

Nothing here loads what a command needs: its module is imported when it runs.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen2audio_jax._version import __version__
from qwen2audio_jax.cli import command_options as own
from qwen2audio_jax.cli import options as shared
from qwen2audio_jax.cli import tasks_options as tasks
from qwen2audio_jax.cli.remedies import as_options
from qwen2audio_jax.command_line import Parser

SHELLS = ("bash", "zsh", "tcsh")
DESCRIPTION = "Qwen2-Audio: speech, sound and music in, text out."


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        help: in the list of all.
        description: in its own help.
        examples: command lines that are right as they stand.
        options: what adds its options to a parser, in the order of the help.
        run: module of `cli` and function in it, which takes the parsed options and returns an exit code or None.
        stray: what to do about words that belong to no option.
    """

    help: str
    description: str
    examples: tuple[str, ...]
    options: tuple[Callable[[Parser], None], ...]
    run: str
    stray: str = "leave it out"


_TASK = (tasks.add_hearing_options, shared.add_model_options, shared.add_quiet)
_ENGINE = (tasks.add_engine_options, tasks.add_kind_option, *_TASK)
COMMANDS = {
    "transcribe": Command(
        help="speech to text, of any length",
        description="Transcribe sound of any length: cut at silence, windows answered side by side, silence and noise "
        "left out. The text goes to stdout, or into a file for each sound in --output-dir. docs/tasks.md says what can "
        "be doubtful about it.",
        examples=(
            "qwen2audio transcribe example:digits-4719",
            "qwen2audio transcribe talk.mp3 --model Qwen/Qwen2-Audio-7B --language zh",
            "qwen2audio transcribe *.wav --output-format srt --output-dir subtitles",
        ),
        options=(tasks.add_files, tasks.add_transcribe_options, *_ENGINE),
        run="tasks:run_task",
    ),
    "translate": Command(
        help="speech to text in another language",
        description="Translate speech of any length into English, Chinese or German; otherwise as transcribe.",
        examples=("qwen2audio translate rede.ogg --model Qwen/Qwen2-Audio-7B --from de --to en",),
        options=(tasks.add_files, tasks.add_translate_options, *_ENGINE),
        run="tasks:run_task",
    ),
    "caption": Command(
        help="what can be heard",
        description="Say in a sentence what can be heard in each file.",
        examples=("qwen2audio caption street.wav --model Qwen/Qwen2-Audio-7B",),
        options=(tasks.add_files, tasks.add_caption_options, *_ENGINE),
        run="tasks:run_task",
    ),
    "classify": Command(
        help="which label fits",
        description="Say which label fits each clip best, by how probable the model finds every one after the prompt: "
        "no label has to be what it would say by itself.",
        examples=(
            "qwen2audio classify example:tone example:noise",
            "qwen2audio classify cry.wav --model Qwen/Qwen2-Audio-7B --task emotion --json",
            'qwen2audio classify cry.wav --model Qwen/Qwen2-Audio-7B --labels "a dog,a cat" --score calibrated',
        ),
        options=(
            tasks.add_files,
            tasks.add_classify_options,
            tasks.add_kind_option,
            *_TASK,
        ),
        run="tasks:run_task",
    ),
    "ask": Command(
        help="a question about sounds",
        description="Answer a question about each sound; without --question or --task the sound is the question "
        "(voice chat). What is longer than 30 s is several clips of one prompt, as far as --positions allow.",
        examples=(
            'qwen2audio ask example:digits-4719 --question "How many digits are spoken?"',
            "qwen2audio ask example:sum-two-plus-three",
        ),
        options=(tasks.add_files, tasks.add_ask_options, *_ENGINE),
        run="tasks:run_task",
        stray="the question goes behind --question, in quotes",
    ),
    "embed": Command(
        help="audio features",
        description="Write the audio features of sounds, one vector for 40 ms, into one file.",
        examples=("qwen2audio embed example:tone example:noise --output vectors.npz --pool mean",),
        options=(tasks.add_files, tasks.add_embed_options, *_TASK),
        run="tasks:run_task",
    ),
    "generate": Command(
        help="answer one prompt",
        description="Answer one prompt about the given clips; the answer goes to stdout as it is made, everything else "
        "to stderr. Without a prompt the clips are the message (voice chat).",
        examples=(
            'qwen2audio generate --audio example:digits-4719 "Which digits are spoken?"',
            'qwen2audio generate --model Qwen/Qwen2-Audio-7B-Instruct --audio a.wav --audio b.mp3 "What differs?"',
            'qwen2audio generate --each a.wav b.wav --json "Transcribe the speech."',
            'ffmpeg -i film.mkv -f wav - | qwen2audio generate --audio - "What is said?"',
        ),
        options=(
            own.add_prompt,
            shared.add_model_options,
            partial(shared.add_input_options, single_prompt=True),
            shared.add_generation_options,
            shared.add_profile_option,
            partial(shared.add_output_options, single_prompt=True),
            shared.add_process_options,
        ),
        run="generate:generate",
        stray="the prompt is one argument, in quotes, and a clip goes behind --audio",
    ),
    "chat": Command(
        help="hold a conversation",
        description="Hold a conversation; in it, /help lists the commands.",
        examples=("qwen2audio chat --model Qwen/Qwen2-Audio-7B-Instruct", "qwen2audio chat < messages.txt"),
        options=(
            shared.add_model_options,
            partial(shared.add_input_options, single_prompt=False),
            shared.add_generation_options,
            shared.add_profile_option,
            partial(shared.add_output_options, single_prompt=False),
        ),
        run="chat:run",
        stray="messages come from the terminal or a pipe",
    ),
    "batch": Command(
        help="answer many prompts",
        description="Answer every record of a manifest into a folder of part files, each complete or absent. A job "
        "that was stopped or killed goes on when the same command is given again; several hosts share one by --shard, "
        "or as their scheduler says. Exit code 3: stopped by a signal, or other hosts' shards are missing. "
        "docs/batch.md has the forms of records and of rows.",
        examples=(
            'qwen2audio batch clips/ --output answers --prompt "Transcribe the speech."',
            "qwen2audio batch records.jsonl --output answers --dry-run",
            "qwen2audio batch 'gs://bucket/*.tar' --output gs://bucket/answers --shard 0/4",
        ),
        options=(
            own.add_batch_options,
            shared.add_model_options,
            shared.add_generation_options,
            partial(shared.add_process_options, of="--mesh-across-hosts"),
        ),
        run="batch:batch",
    ),
    "serve": Command(
        help="answer over HTTP, as OpenAI's API",
        description="Answer chats and transcriptions over HTTP in OpenAI's protocol, several at a time (extra: "
        "serve). docs/serve.md has the addresses. SIGTERM ends it after the requests that run.",
        examples=("qwen2audio serve --port 8000", "qwen2audio serve --host 0.0.0.0 --api-key-file keys.txt"),
        options=(own.add_serve_options, tasks.add_kind_option, shared.add_model_options),
        run="serve:serve",
    ),
    "train": Command(
        help="fine-tune a model",
        description="Fine-tune a model as a configuration says (extra: train). The output folder gets checkpoints, "
        "metrics.jsonl, TensorBoard events (tensorboard --logdir DIR/tensorboard) and a picture of the loss. A run "
        "that was stopped, or killed, continues from its last checkpoint when the same command is given again.",
        examples=(
            "qwen2audio train lora.toml --output run1",
            "qwen2audio train lora.toml --set data.rows=16 --set steps=500",
            "qwen2audio train --convert-records sharegpt.json records.jsonl",
        ),
        options=(own.add_train_options, shared.add_process_options),
        run="train:run",
    ),
    "evaluate": Command(
        help="score a model on labelled sound",
        description="Score a model on a task: records with what is expected are answered by a batch job into --output, "
        "which can be stopped, continued and shared among hosts, and the report (JSON, Markdown, a picture of a "
        "confusion matrix) is written there (extra: evaluate). docs/evaluation.md has the forms of records and the "
        "scores. Without a task: digit error rate and the share of right answers on synthesised speech.",
        examples=(
            "qwen2audio evaluate --fresh 100",
            "qwen2audio evaluate transcribe --manifest test.jsonl --language en --output scores",
            "qwen2audio evaluate emotion --manifest meld.jsonl --model Qwen/Qwen2-Audio-7B --output meld",
            "qwen2audio evaluate ask --manifest choices.jsonl --questions letters --output choices --shard 0/2",
            "qwen2audio evaluate --fresh 400 --output fresh",
        ),
        options=(own.add_evaluate_options, shared.add_model_options, shared.add_process_options),
        run="evaluate:run",
        stray="a task comes first, and manifests go behind --manifest",
    ),
    "plan": Command(
        help="which machine a model needs",
        description="Say what a model takes on a machine that need not be there: memory of a chip, whether it fits "
        "and with how many rows at most, what the chips send each other, and how fast it could be at best. For TPUs "
        "the real programs are compiled (extra: plan; minutes, on a CPU); for GPUs it is arithmetic. Says on stderr "
        "how far it is.",
        examples=(
            "qwen2audio plan --topology v5e:2x4",
            "qwen2audio plan --topology h100x8 --clips 1000000 --mean-seconds 12",
            "qwen2audio plan --topology v5p:2x2x1 --train lora",
        ),
        options=(own.add_plan_options,),
        run="plan:plan",
    ),
    "convert": Command(
        help="convert a checkpoint",
        description="",
        examples=(),
        options=(),
        run="convert:convert",
    ),
    "models": Command(
        help="list and remove conversions",
        description="List what was converted or copied into the cache folder, with its source, size and state; remove "
        "some of it. What is removed is converted again when it is asked for.",
        examples=("qwen2audio models", "qwen2audio models --clean"),
        options=(own.add_models_options,),
        run="models:models",
    ),
    "doctor": Command(
        help="check the machine or a checkpoint",
        description="Without --model check the machine: versions, devices, memory, decoders, folders, processes, and "
        "what usually goes wrong with TPUs. With it check a checkpoint: files, names, shapes, every stored byte, "
        "finite weights, the tokenizer. With --smoke compute: each stage of the embedded model on the default device, "
        "beside the CPU. Exit code 1 if something is wrong.",
        examples=("qwen2audio doctor", "qwen2audio doctor --smoke", "qwen2audio doctor --model checkpoint --json"),
        options=(own.add_doctor_options, shared.add_process_options),
        run="doctor:examine",
    ),
}


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        from qwen2audio_jax.cli.completion import completion

        try:
            print(completion(parser, shell=values))
        except ValueError as error:
            parser.error(str(error))
        parser.exit()


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="qwen2audio",
        description=DESCRIPTION,
        examples=('qwen2audio generate --audio example:digits-4719 "Which digits are spoken?"', "qwen2audio doctor"),
    )
    parser.add_argument("--version", action="version", version=f"qwen2audio {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print what a shell needs to complete commands and options (extra: completion)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        # The converter has a parser of its own, as `python -m convert` is a command too.
        one = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            examples=command.examples,
            stray=command.stray,
            add_help=name != "convert",
        )
        for add in command.options:
            add(one)
    return parser


def in_options(error: BaseException, name: str) -> str:
    """An error's message in a line, with the library's arguments written as options of the command of that name."""
    parser = Parser()
    for add in COMMANDS[name].options:
        add(parser)
    return as_options(" ".join(str(error).split()), parser._option_string_actions)

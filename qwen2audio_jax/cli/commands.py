"""The commands of `qwen2audio` as a table: what each says about itself, its options, and where it runs.

Nothing here loads what a command needs: its module is imported when it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qwen2audio_jax._version import __version__
from qwen2audio_jax.cli import command_options as own
from qwen2audio_jax.cli import options as shared
from qwen2audio_jax.command_line import Parser

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


COMMANDS = {
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
            shared.add_output_options,
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
        options=(own.add_serve_options, shared.add_model_options),
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
        help="score a model on spoken digits",
        description="Score a model on synthesised speech: digit error rate of transcriptions, and the share of right "
        "answers to sums and to questions about one clip and about two.",
        examples=("qwen2audio evaluate --fresh 100", "qwen2audio evaluate --data speech/test --json"),
        options=(shared.add_model_options, own.add_evaluate_options, shared.add_process_options),
        run="evaluate:run",
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
        "finite weights, the tokenizer. Exit code 1 if something is wrong.",
        examples=("qwen2audio doctor", "qwen2audio doctor --model checkpoint --json"),
        options=(own.add_doctor_options, shared.add_process_options),
        run="doctor:examine",
    ),
}


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="qwen2audio",
        description=DESCRIPTION,
        examples=('qwen2audio generate --audio example:digits-4719 "Which digits are spoken?"', "qwen2audio doctor"),
    )
    parser.add_argument("--version", action="version", version=f"qwen2audio {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if name == "convert":  # it has a parser of its own, as `python -m convert` is a command too
            commands.add_parser(name, help=command.help, add_help=False)
            continue
        one = commands.add_parser(
            name, help=command.help, description=command.description, examples=command.examples, stray=command.stray
        )
        for add in command.options:
            add(one)
    return parser

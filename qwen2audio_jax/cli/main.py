"""The command `qwen2audio`: parses the arguments, runs a subcommand, and turns errors into an exit code.

Exit codes: 0 done; 1 failed; 2 bad input, with one line on stderr that states the problem; 3 a batch job that was
stopped and can go on. QWEN2AUDIO_DEBUG=1 shows the traceback of an error.
"""

import io
import os
import sys
from collections.abc import Sequence

from qwen2audio_jax._version import __version__
from qwen2audio_jax.cli.options import (
    Parser,
    add_batch_options,
    add_doctor_options,
    add_evaluate_options,
    add_generation_options,
    add_input_options,
    add_model_options,
    add_models_options,
    add_output_options,
    add_plan_options,
    add_process_options,
    add_serve_options,
    add_train_options,
)
from qwen2audio_jax.cli.output import one_line, say

DESCRIPTION = "Qwen2-Audio: speech, sound and music in, text out."
GENERATE = """\
Answer one prompt about the given clips; the answer goes to stdout as it is made, everything else to stderr.
Without a prompt the clips are the message (voice chat)."""
CHAT = "Hold a conversation; in it, /help lists the commands."
DOCTOR = """\
Without --model check the machine: versions, devices, memory, decoders, folders, processes, and what usually goes wrong
with TPUs. With it check a checkpoint: files, names, shapes, every stored byte, finite weights, the tokenizer. Exit code
1 if something is wrong."""
TRAIN = """\
Fine-tune a model as a configuration says. The output folder gets checkpoints, metrics.jsonl, TensorBoard events
(tensorboard --logdir DIR/tensorboard) and a picture of the loss. A run that was stopped, or killed, continues from its
last checkpoint when the same command is given again. Needs the extra: pip install 'qwen2audio-jax[train]'."""
EVALUATE = """\
Score a model on synthesised speech: digit error rate of transcriptions, and the share of right answers to sums and to
questions about one clip and about two."""
PLAN = """\
Say what a model takes on a machine that need not be there: memory of a chip, whether it fits and with how many rows at
most, what the chips send each other, and how fast it could be at best. For TPUs the real programs are compiled (extra:
pip install 'qwen2audio-jax[plan]'; minutes, on a CPU); for GPUs it is arithmetic. Says on stderr how far it is."""
BATCH = """\
Answer every record of a manifest into a folder of part files, each complete or absent. A job that was stopped or killed
goes on when the same command is given again; several hosts share one by --shard, or as their scheduler says. Exit code
3: stopped by a signal, or other hosts' shards are missing. docs/batch.md has the forms of records and of rows."""
SERVE = """\
Answer chats and transcriptions over HTTP in OpenAI's protocol, several at a time (extra: serve). docs/serve.md has the
addresses. SIGTERM ends it after the requests that run."""
MODELS = """\
List what was converted or copied into the cache folder, with its source, size and state; remove some of it. What is
removed is converted again when it is asked for."""
CONVERT = "Convert a Hugging Face checkpoint to an Orbax checkpoint."


def build_parser() -> Parser:
    """The command's options, documented."""
    parser = Parser(prog="qwen2audio", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"qwen2audio {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    generate = commands.add_parser("generate", help="answer one prompt", description=GENERATE)
    generate.add_argument("prompt", nargs="?", help="the text; - reads it from stdin, without its last line break")
    chat = commands.add_parser("chat", help="hold a conversation", description=CHAT)
    batch = commands.add_parser("batch", help="answer many prompts", description=BATCH)
    add_batch_options(batch)
    add_model_options(batch)
    add_generation_options(batch)
    serve = commands.add_parser("serve", help="answer over HTTP, as OpenAI's API", description=SERVE)
    add_serve_options(serve)
    add_model_options(serve)
    add_train_options(commands.add_parser("train", help="fine-tune a model", description=TRAIN))
    evaluate = commands.add_parser("evaluate", help="score a model on spoken digits", description=EVALUATE)
    add_model_options(evaluate)
    add_evaluate_options(evaluate)
    add_plan_options(commands.add_parser("plan", help="which machine a model needs", description=PLAN))
    commands.add_parser("convert", help="convert a checkpoint", add_help=False)
    add_models_options(commands.add_parser("models", help="list and remove conversions", description=MODELS))
    add_doctor_options(commands.add_parser("doctor", help="check the machine or a checkpoint", description=DOCTOR))
    for command in (generate, chat):
        add_model_options(command)
        add_input_options(command, single_prompt=command is generate)
        add_generation_options(command)
        command.add_argument("--profile", metavar="DIR", help="write a trace of the computation there (jax.profiler)")
    add_output_options(generate)
    for name in ("generate", "train", "evaluate", "doctor"):
        add_process_options(commands.choices[name])
    add_process_options(batch, of="--mesh-across-hosts")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; like argparse it raises SystemExit for bad options and --help."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["convert"]:
        # The converter is also a standalone command, with its own options.
        from qwen2audio_jax.convert.__main__ import main as convert

        return convert(arguments[1:], prog="qwen2audio convert")
    options = build_parser().parse_args(arguments)
    # JAX would reserve most of a GPU's memory at once, and other programs may need it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Imported here: --help and --version need neither.
    if options.command == "generate":
        from qwen2audio_jax.cli.generate import generate
    elif options.command == "batch":
        from qwen2audio_jax.cli.batch import batch
    elif options.command == "serve":
        from qwen2audio_jax.cli.serve import serve as run
    elif options.command == "doctor":
        from qwen2audio_jax.cli.doctor import examine
    elif options.command == "models":
        from qwen2audio_jax.cli.models import models
    elif options.command == "plan":
        from qwen2audio_jax.cli.plan import plan
    elif options.command == "train":
        from qwen2audio_jax.cli.train import run
    elif options.command == "evaluate":
        from qwen2audio_jax.cli.evaluate import run
    else:
        from qwen2audio_jax.cli.chat import run
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character gets its code point, so that the answer continues.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = 0
        if options.command == "doctor":
            code = examine(options)
        elif options.command == "models":
            code = models(options)
        elif options.command == "plan":
            code = plan(options, arguments)
        elif options.command == "batch":
            code = batch(options)
        elif options.command == "generate":
            code = generate(options)
        else:
            run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of the output has closed it; the interpreter's final flush must not report that either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("QWEN2AUDIO_DEBUG") == "1":
            raise
        bad_input = isinstance(error, ValueError)
        said = one_line(error)
        if isinstance(error, KeyboardInterrupt):
            said = "interrupted"
        elif not bad_input:
            said = f"failed: {type(error).__name__}: {said}"
        say(f"qwen2audio {options.command}: {said}")
        return 2 if bad_input else 1


if __name__ == "__main__":
    sys.exit(main())

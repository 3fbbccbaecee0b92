"""`qwen2audio chat`: a conversation, line by line from a terminal or a pipe."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.cli.clips import load_clip
from qwen2audio_jax.cli.commands import in_options
from qwen2audio_jax.cli.from_options import join, load_model, prepare, tell_model
from qwen2audio_jax.cli.output import note, read_pieces, say, write
from qwen2audio_jax.cli.profile import check_profile_folder, profiled
from qwen2audio_jax.cli.stats import Stats, in_words
from qwen2audio_jax.command_line import nearest
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

COMMANDS = ("/audio", "/system", "/reset", "/help", "/quit")
HELP = """\
A line is a message; an empty line sends the clips added so far on their own. Ctrl-C stops an answer.
  /audio FILE   add a clip (a file, a URL or example:NAME) to the next message; may be repeated
  /system TEXT  change the system message; without TEXT: back to the chat template's own
  /reset        forget the conversation and the clips added
  /help         show this
  /quit         leave; so does Ctrl-D
  //TEXT        send a message that begins with /"""


def run(options: argparse.Namespace) -> None:
    """Run the conversation until the input ends; an error in one line is reported on stderr and does not end it.

    Raises:
        ValueError: the options name no usable model.
    """
    check_profile_folder(options.profile)
    processor, arguments = prepare(options)
    arguments["num_return_sequences"] = 1
    join(options)
    model = load_model(options)
    tell_model(options)
    chat = Chat(model, processor, options=options, arguments=arguments)
    with profiled(options.profile):
        _converse(chat)


def _converse(chat: "Chat") -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        say("/help lists the commands")
    for line in read_lines(interactive=interactive):
        if line.strip() == "/quit":
            return
        try:
            chat.handle(line)
        except KeyboardInterrupt:
            say("(stopped; the message is taken back)")
        except ValueError as error:
            if os.environ.get("QWEN2AUDIO_DEBUG") == "1":
                raise
            say(in_options(error, "chat"))
    if chat.clips:
        say(f"{len(chat.clips)} clip{'s' * (len(chat.clips) > 1)} added and not sent: end with an empty line to send")


class Chat:
    """The conversation so far, and the clips for the next message.

    Every turn renders the whole conversation; the session recomputes none of its cached prefix, even if answers are
    tokenised differently when rendered again.

    Attributes:
        system: the system message; None leaves it to the chat template.
        history: messages of user and assistant.
        clips: samples [n] float32 at 16 kHz, each.
    """

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        processor: Qwen2AudioProcessor,
        *,
        options: argparse.Namespace,
        arguments: dict[str, Any],
    ):
        """Start a conversation; `arguments` are those of `stream` besides the inputs."""
        self._model, self._processor, self._options, self._arguments = model, processor, options, arguments
        self._session = model.session()
        self.system: str | None = options.system
        self.history: list[dict[str, Any]] = []
        self.clips: list[Any] = []

    def handle(self, line: str) -> None:
        """Handle a line: run a command, or answer a message on stdout.

        Raises:
            ValueError, KeyboardInterrupt: it was not completed; the conversation and the added clips are unchanged.
        """
        text = line.strip()
        if text.startswith("//"):
            self._answer(text[1:])
        elif text.startswith("/"):
            command, _, argument = text.partition(" ")
            self._command(command, argument.strip())
        elif text or self.clips:
            self._answer(text)

    def _command(self, command: str, argument: str) -> None:
        if command == "/audio":
            if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"":
                argument = argument[1:-1]  # as terminals paste the path of a dropped file
            if not argument:
                raise ValueError("/audio needs a file, as in: /audio speech.wav")
            extractor = self._processor.feature_extractor
            clip = load_clip(argument, options=self._options, extractor=extractor)
            self.clips.append(clip.samples)
            if not self._options.quiet:
                seconds = len(clip.samples) / extractor.sampling_rate
                say(f"clip {len(self.clips)}: {seconds:.1f} s; it goes with the next message")
        elif command == "/system":
            self.system = argument or None
        elif command == "/reset" and not argument:
            self.history, self.clips = [], []
            self._session.close()
            self._session = self._model.session()
        elif command == "/help" and not argument:
            say(HELP)
        else:
            hint = "" if command in COMMANDS else nearest(command, COMMANDS)
            raise ValueError(f"no command {command} {argument}".rstrip() + f"{hint}; /help lists them")

    def _answer(self, text: str) -> None:
        content = [{"type": "audio", "audio": clip} for clip in self.clips]
        content += [{"type": "text", "text": text}] if text else []
        asked = {"role": "user", "content": content}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        inputs = self._processor.apply_chat_template(
            [*system, *self.history, asked],
            add_generation_prompt=True,
            tokenize=True,
            allow_special=self._options.allow_special,
        )
        written: list[str] = []
        reason, stats, options = None, Stats(), self._options
        try:
            with (
                stats.stage("answer"),
                closing(self._session.stream(**inputs, **self._arguments)) as pieces,
            ):
                reason = read_pieces(pieces, written=written, stats=stats, quiet=options.quiet, show=not options.json)
        except KeyboardInterrupt:
            if not written:
                raise
            say(" (stopped)")  # the conversation continues from the text printed so far
            write("" if options.json else "\n")
        seconds = sum(map(len, self.clips)) / self._processor.feature_extractor.sampling_rate
        self.history += [asked, {"role": "assistant", "content": "".join(written)}]
        self.clips = []
        self._tell("".join(written), reason=reason, stats=stats, audio_seconds=seconds)

    def _tell(self, text: str, *, reason: str | None, stats: Stats, audio_seconds: float) -> None:
        """Write an answer's object, and say what is surprising about it, and its figures; None: it was stopped."""
        tokens = getattr(reason, "tokens", 0)
        figures = stats.figures(tokens=tokens, audio_seconds=audio_seconds)
        if self._options.json:
            answer = {"text": text, "finish_reason": reason or "stopped", "tokens": tokens}
            write(json.dumps({**answer, **({"stats": figures} if self._options.stats else {})}) + "\n")
        if reason is not None and not self._options.quiet:
            note(text, reason=reason)
        if self._options.stats and not self._options.json:
            say(in_words(figures))


def read_lines(*, interactive: bool) -> Iterator[str]:
    """Lines of stdin until it ends; a terminal gets a prompt and line editing, and Ctrl-C discards the line.

    Raises:
        ValueError: a line of a pipe is not UTF-8.
    """
    if not interactive:
        yield from _piped_lines()
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() its line editing)
    while True:
        try:
            # input() writes the prompt to stdout, which must hold only answers when redirected to a file.
            yield input("> " if sys.stdout.isatty() else "")
        except KeyboardInterrupt:
            say("/quit or Ctrl-D leaves")
        except EOFError:
            say("")
            return


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of the input is not UTF-8 at byte {error.start}") from None

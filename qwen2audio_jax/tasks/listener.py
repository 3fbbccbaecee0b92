"""`Tasks`: a model, its processor and an engine, and what people ask of them.

with Tasks.from_pretrained() as tasks:
print(tasks.transcribe("talk.mp3").text)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.engine import Answer, Engine
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor
from qwen2audio_jax.storage.bucket import PathOrUrl
from qwen2audio_jax.tasks.embeddings import Embeddings, embed
from qwen2audio_jax.tasks.kind import kind_by
from qwen2audio_jax.tasks.labels import Classification, classify
from qwen2audio_jax.tasks.questions import question_request
from qwen2audio_jax.tasks.task import check_kind, find_task
from qwen2audio_jax.tasks.transcribe import Transcribing, transcribe
from qwen2audio_jax.tasks.transcript import Transcript


class Tasks:
    """What a model can be asked about sound. Its methods may be called from any thread.

    Attributes:
        model: the model.
        processor: of the same checkpoint.
        engine: that answers; `Engine.stats` has its figures.
        kind: of the model, as `tasks.task` has them: "base", "instruct" or "embedded".
    """

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        processor: Qwen2AudioProcessor,
        *,
        kind: str | None = None,
        source: object = "",
        **engine: Any,
    ):
        """Start an engine.

        Args:
            model: of any kind.
            processor: of the same checkpoint.
            kind: of the model; default: by `source`, else by the model.
            source: the checkpoint's name.
            **engine: arguments of `Engine`.

        Raises:
            ValueError: there is no such kind, or a number is out of range.
        """
        self.model, self.processor = model, processor
        stops = model.generation_config.eos_token_id
        self.kind = kind or kind_by(processor, model.config, stops, source=source)
        check_kind(self.kind)
        self.engine = Engine(model, processor, **engine)

    @classmethod
    def from_pretrained(
        cls, source: PathOrUrl = EMBEDDED, *, kind: str | None = None, revision: str | None = None, **loading: Any
    ) -> "Tasks":
        """Load a checkpoint; arguments and errors as for `Qwen2AudioForConditionalGeneration.from_pretrained`."""
        processor = Qwen2AudioProcessor.from_pretrained(source, revision=revision)
        model = Qwen2AudioForConditionalGeneration.from_pretrained(source, revision=revision, **loading)
        return cls(model, processor, kind=kind, source=source)

    def close(self) -> None:
        """End the engine."""
        self.engine.close()

    def __enter__(self) -> "Tasks":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def transcribe(self, source: Any, *, language: str | None = None, **how: Any) -> Transcript:
        """The transcript of a sound of any length.

        Args:
            source: as for `stream_audio`.
            language: of the speech; default: "en".
            **how: other fields of `Transcribing`: detector, cutting, gated, checks, retry,
                options, hotwords, seed, hearing.

        Raises:
            AudioError: the sound cannot be heard.
            RequestError: a window cannot be answered.
            ValueError: the model does not have the language.
        """
        return _whole(next(self.transcripts([("", source)], language=language, **how)))

    def translate(self, source: Any, *, languages: str | None = None, **how: Any) -> Transcript:
        """The translation of a sound of any length; `languages` as in "zh-en". Otherwise as `transcribe`."""
        return _whole(next(self.transcripts([("", source)], task="translate", language=languages, **how)))

    def transcripts(
        self,
        sounds: Iterable[tuple[str, Any]],
        *,
        task: str = "transcribe",
        language: str | None = None,
        **how: Any,
    ) -> Iterator[Transcript]:
        """The transcripts or translations of many sounds (name, source), in order; see `tasks.transcribe`."""
        found = find_task(task, kind=self.kind, language=language)
        return transcribe(self.engine, sounds, Transcribing(task=found, **how))

    def ask(self, source: Any, question: str | None = None, *, task: str | None = None, **options: Any) -> Answer:
        """The answer to a question about a sound; without one the sound is the question.

        Args:
            source: as for `stream_audio`. What is longer than a clip is several of one prompt.
            question: any.
            task: another one than "ask" and "voice_chat", which has a prompt of its own: "sound", "music", "caption".
            **options: of generation.

        Raises:
            AudioError: the sound cannot be heard.
            RequestError: it cannot be answered.
            ValueError: the sound is too long for the model's positions, or the kind of model has no such task.
        """
        name = task or ("ask" if question else "voice_chat")
        found = find_task(name, kind=self.kind, question=question)
        request = question_request(source, found, positions=self.engine.positions, options=options)
        return self.engine.submit(request).result()

    def caption(self, source: Any, **options: Any) -> str:
        """A caption; arguments and errors as for `ask`."""
        task = find_task("caption", kind=self.kind)
        return task.clean(self.ask(source, task="caption", **options).text)

    def classify(
        self,
        source: Any,
        labels: Sequence[str] | Mapping[str, str] | None = None,
        *,
        task: str = "choose",
        score: str = "raw",
    ) -> Classification:
        """The label that fits a clip best, by log-likelihood.

        Args:
            source: as for `load_audio`.
            labels: any, or what is shown -> the text that is scored; default: the task's own.
            task: one of `task.CLASSES`.
            score: one of `labels.SCORES`.

        Raises:
            AudioError: the clip cannot be heard.
            ValueError: fewer than two labels, or the kind of model has no such task.
        """
        found = find_task(task, kind=self.kind, labels=labels)
        return classify(self.model, self.processor, source, task=found, score=score)

    def embed(self, source: Any, **options: Any) -> Embeddings:
        """The audio features of a sound of any length; see `embeddings.embed`."""
        return embed(self.model, self.processor, source, **options)


def _whole(transcript: Transcript) -> Transcript:
    if transcript.error is not None:
        raise transcript.error
    return transcript

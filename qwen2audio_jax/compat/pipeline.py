"""`pipeline` of transformers for the one task that this model has: a prompt or a chat, with sound, to text."""

from collections.abc import Mapping, Sequence
from typing import Any

from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.generation.arguments import INPUTS
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

TASKS = ("any-to-any", "audio-text-to-text", "text-generation", "image-text-to-text")
"""Names under which releases of transformers have it; the last is that of all models that take more than text."""
_TASKS = "use qwen2audio_jax.tasks: Tasks.from_pretrained(source)"
_INSTEAD = {
    "automatic-speech-recognition": f"{_TASKS}.transcribe(path).text, of any length",
    "audio-classification": f"{_TASKS}.classify(path, labels=[...])",
    "zero-shot-audio-classification": f"{_TASKS}.classify(path, labels=[...])",
    "feature-extraction": f"{_TASKS}.embed(path)",
}


class Pipeline:
    """A model and its processor, called with a chat or a prompt.

    Attributes:
        model: `Qwen2AudioForConditionalGeneration`.
        processor: of the same checkpoint; `tokenizer` and `feature_extractor` are its.
    """

    def __init__(self, model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor):
        self.model, self.processor = model, processor
        self.tokenizer, self.feature_extractor = processor.tokenizer, processor.feature_extractor

    def __call__(
        self,
        text: Any = None,
        *,
        audio: Any = None,
        return_full_text: bool | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Answer a chat or a raw prompt, or several.

        Args:
            text: a list of messages, a prompt with `<|AUDIO|>` for every clip of `audio`, or a list of such.
            audio: the clips of prompts, as the processor takes them; a chat has its own.
            return_full_text: with chats, True (the default) gives the messages with the answer as the last one; with
                prompts, the prompt before the answer; False the answer's text alone.
            generate_kwargs: options of `generate`.
            **options: likewise.

        Returns:
            For each input {"input_text": the input, "generated_text": ...}.

        Raises:
            TypeError, ValueError: as the processor and `generate`; clips beside a chat.
        """
        if text is None:
            raise TypeError("text= is missing: give a list of messages, or a prompt and audio=")
        full = return_full_text is not False
        settings = {**(generate_kwargs or {}), **options}
        if _is_chat(text):
            if audio is not None:
                raise ValueError("a chat has its clips in its messages: {'type': 'audio', 'path': path}")
            chats = [text] if isinstance(text[0], Mapping) else list(text)
            inputs = self.processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
            answers = self._answers(inputs, settings)
            return [
                {"input_text": chat, "generated_text": [*chat, _turn(answer)] if full else answer}
                for chat, answer in zip(chats, answers, strict=True)
            ]
        prompts = [text] if isinstance(text, str) else list(text)
        answers = self._answers(self.processor(text=prompts, audio=audio), settings)
        return [
            {"input_text": prompt, "generated_text": prompt + answer if full else answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _answers(self, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
        arrays = {name: inputs[name] for name in INPUTS if name in inputs}
        ids = self.model.generate(**arrays, tokenizer=self.processor, **settings)
        return self.processor.batch_decode(ids[:, arrays["input_ids"].shape[1] :], skip_special_tokens=True)


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    processor: Qwen2AudioProcessor | None = None,
    tokenizer: Any = None,
    feature_extractor: Any = None,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline.

    Args:
        task: "any-to-any", "audio-text-to-text", "image-text-to-text" or "text-generation"; they are the same here.
        model: a loaded model, or the source of one; default: the embedded model.
        processor: of the model; default: of its source.
        tokenizer: unused: the processor has it.
        feature_extractor: unused: the processor has it.
        revision: of a hub id.
        model_kwargs: options of `Qwen2AudioForConditionalGeneration.from_pretrained`.
        **options: likewise, such as dtype, mesh and device_map.

    Raises:
        ValueError: another task, or a loaded model without its processor.
    """
    if task not in (None, *TASKS):
        remedy = _INSTEAD.get(task, f"this model has {', '.join(TASKS[:2])}")
        raise ValueError(f"there is no pipeline for {task!r}: {remedy}")
    if isinstance(model, Qwen2AudioForConditionalGeneration):
        if processor is None:
            raise ValueError("a loaded model needs its processor: pass processor=, or the model's source as model=")
        return Pipeline(model, processor)
    source = EMBEDDED if model is None else model
    processor = Qwen2AudioProcessor.from_pretrained(source, revision=revision) if processor is None else processor
    words = {**(model_kwargs or {}), **options}
    return Pipeline(Qwen2AudioForConditionalGeneration.from_pretrained(source, revision=revision, **words), processor)


def _is_chat(text: Any) -> bool:
    if isinstance(text, str) or not isinstance(text, Sequence) or not text:
        return False
    first = text[0]
    return isinstance(first, Mapping) or (not isinstance(first, str) and bool(first) and isinstance(first[0], Mapping))


def _turn(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}

"""The processor: text and audio to the model's inputs, and generated token ids back to text."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qwen2audio_jax.embedded import EMBEDDED
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.processing.chat_encoding import check_no_control_text, encode_chat, render_chat
from qwen2audio_jax.processing.chat_template import DEFAULT_CHAT_TEMPLATE, ChatTemplate
from qwen2audio_jax.processing.collate import CLIPS
from qwen2audio_jax.processing.conversation import ClipSource, Conversation, is_batch, read_conversation
from qwen2audio_jax.processing.feature_extractor import Qwen2AudioFeatureExtractor
from qwen2audio_jax.processing.files import (
    DEFAULT_AUDIO_TOKEN,
    ProcessorFiles,
    read_processor_files,
    write_processor_files,
)
from qwen2audio_jax.processing.open_end import OpenEnd
from qwen2audio_jax.processing.output import ProcessorOutput, check_return_tensors, to_output
from qwen2audio_jax.processing.padding import pad_rows
from qwen2audio_jax.processing.placeholders import assign_clips, load_clips
from qwen2audio_jax.processing.tokenizer import SPECIAL_NAMES, Qwen2AudioTokenizer
from qwen2audio_jax.storage.bucket import PathOrUrl, folder_at, is_url
from qwen2audio_jax.torch_style.attributes import PROCESSOR, no_attribute
from qwen2audio_jax.torch_style.call_options import refuse_unknown, takes_groups
from qwen2audio_jax.torch_style.loading_options import take_loading_options, take_saving_options

PADDING_OPTIONS = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
AUDIO_OPTIONS = ("sampling_rate", "truncation", "allow_truncated", "track", "allow_private_urls")
CALL_OPTIONS = ("text", "audio", *PADDING_OPTIONS, *AUDIO_OPTIONS, "return_tensors")
CHAT_OPTIONS = (
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "allow_special",
    *PADDING_OPTIONS,
    *AUDIO_OPTIONS,
    "return_tensors",
)
INPUT_NAMES = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
ATTRIBUTES = ("tokenizer", "feature_extractor", "audio_token", "audio_token_id", "chat_template")


class Qwen2AudioProcessor:
    """The tokenizer, the feature extractor and the chat template of a checkpoint, used together.

    Source: `transformers.Qwen2AudioProcessor`. An instance may be shared between threads as long as none assigns.

    Attributes:
        tokenizer: `Qwen2AudioTokenizer`; its `padding_side` and special tokens may be assigned.
        feature_extractor: `Qwen2AudioFeatureExtractor`; its `sampling_rate` is the one that arrays must have.
        chat_template: jinja2 source; another may be assigned.
        audio_token, audio_token_id: the placeholder of a clip.
        audio_bos_token, audio_eos_token: what stands around it.
    """

    audio_bos_token, audio_eos_token = "<|audio_bos|>", "<|audio_eos|>"

    def __init__(
        self,
        *,
        tokenizer: Qwen2AudioTokenizer,
        feature_extractor: Qwen2AudioFeatureExtractor,
        chat_template: str | None = None,
        audio_token: str = DEFAULT_AUDIO_TOKEN,
    ):
        self.tokenizer, self.feature_extractor, self.audio_token = tokenizer, feature_extractor, audio_token
        self.chat_template = DEFAULT_CHAT_TEMPLATE if chat_template is None else chat_template
        if audio_token not in tokenizer.control_tokens:
            raise ValueError(
                f"the tokenizer has no token {audio_token!r}, which stands for a clip; take tokenizer.json and "
                f"tokenizer_config.json from a Qwen2-Audio checkpoint"
            )
        self.audio_token_id = tokenizer.control_tokens[audio_token].id

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign `chat_template`; an AttributeError names what to use for other attributes."""
        if name not in ATTRIBUTES or (name in self.__dict__ and name != "chat_template"):
            remedy = "make another with Qwen2AudioProcessor(tokenizer=..., feature_extractor=...)"
            if name == "padding_side" or name.removesuffix("_id") in SPECIAL_NAMES:
                remedy = f"assign it to its tokenizer, as in processor.tokenizer.{name} = ..."
            raise AttributeError(f"the processor's {name} cannot be assigned; {remedy}")
        if name in self.__dict__:
            ChatTemplate(value)  # a checkpoint's own is compiled where it is used
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """Nothing; the error names what to use instead of an attribute of transformers' processors."""
        raise no_attribute("processor", name, PROCESSOR)

    @classmethod
    def from_pretrained(
        cls,
        source: PathOrUrl = EMBEDDED,
        *,
        revision: str | None = None,
        padding_side: str | None = None,
        chat_template: str | None = None,
        **words: Any,
    ) -> "Qwen2AudioProcessor":
        """Read the files of a checkpoint.

        Args:
            source: a folder (a converted checkpoint, or one in the Hugging Face layout, as published or as transformers
                saves it again), the URL of one in a bucket (extra: `buckets`), or a hub id (extra: `hub`); default: the
                model that comes with the package (see `qwen2audio_jax.embedded`).
            revision: of a hub id.
            padding_side: assigned to the tokenizer.
            chat_template: jinja2 source instead of the checkpoint's.
            **words: options of transformers' `from_pretrained`: those without effect here (trust_remote_code, use_fast,
                ...) are taken, others name what to write instead.

        Raises:
            TypeError: an unknown option.
            ValueError: a file is missing or holds something that is not supported; the message names both.
        """
        take_loading_options(words, known=("revision", "padding_side", "chat_template"))
        folder = folder_at(source)
        if is_url(source) or not folder.is_dir() or revision is not None:
            # Imported here: a local folder needs none of the modules that fetch checkpoints.
            from qwen2audio_jax.source import resolve_processor_files

            folder = resolve_processor_files(source, revision=revision)
        files = read_processor_files(folder)
        tokenizer = Qwen2AudioTokenizer(files.tokenizer_json, settings=files.tokenizer_config)
        if padding_side is not None:
            tokenizer.padding_side = padding_side
        return cls(
            tokenizer=tokenizer,
            feature_extractor=Qwen2AudioFeatureExtractor.from_dict(files.feature_extractor),
            chat_template=files.chat_template if chat_template is None else chat_template,
            audio_token=files.audio_token,
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the arrays that a call with clips returns."""
        return list(INPUT_NAMES)

    def to_dict(self) -> dict[str, Any]:
        """The settings as processor_config.json holds them: those of the feature extractor, and the placeholder."""
        extractor = self.feature_extractor.to_dict()
        return {
            "processor_class": "Qwen2AudioProcessor",
            "audio_token": self.audio_token,
            "feature_extractor": extractor,
        }

    def to_json_string(self) -> str:
        """The settings as the text of processor_config.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def pad(self, outputs: Any, *, return_tensors: str | None = None, **padding: Any) -> ProcessorOutput:
        """Outputs of several calls put together into one batch, as a collate function does it.

        Args:
            outputs: a list of what calls returned.
            return_tensors: None or "np" for numpy, "jax" for JAX arrays.
            **padding: padding, padding_side, max_length and pad_to_multiple_of, as for a call.

        Returns:
            What one call with all of it would return.

        Raises:
            ValueError: other names, or arrays that do not fit.
        """
        parts = [dict(part) for part in outputs]
        texts = [{name: part[name] for name in part if name not in CLIPS} for part in parts]
        clips = [heard for part in parts if (heard := {name: part[name] for name in CLIPS if name in part})]
        arrays = dict(self.tokenizer.pad(texts, **padding))
        if clips:
            arrays |= self.feature_extractor.pad(clips)
        return to_output(arrays, return_tensors=return_tensors)

    def save_pretrained(self, folder: str | PathLike[str], **words: Any) -> list[str]:
        """Write tokenizer.json, tokenizer_config.json, preprocessor_config.json and chat_template.jinja into a folder.

        Both this class and transformers read them back. Returns the files' paths.

        `words`: of the reference, at values that change nothing, as push_to_hub=False.
        """
        take_saving_options(words)
        files = ProcessorFiles(
            tokenizer_json=self.tokenizer.to_json(),
            tokenizer_config=self.tokenizer.settings,
            feature_extractor=self.feature_extractor.to_dict(),
            chat_template=self.chat_template,
            audio_token=self.audio_token,
        )
        return [str(path) for path in write_processor_files(Path(folder), files)]

    @takes_groups
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        *,
        audios: Any = None,
        sampling_rate: int | None = None,
        padding: bool | str | None = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        allow_truncated: bool = False,
        track: int | None = None,
        return_tensors: str | None = None,
        allow_private_urls: bool = False,
        **unknown: Any,
    ) -> ProcessorOutput:
        """The model's inputs for raw prompts, with their placeholders and control tokens.

        A text is encoded as in the reference: every `<|...|>` in it is a control token, wherever it came from. For
        user input use `apply_chat_template`.

        Args:
            text: a prompt, or one for each row, with `<|AUDIO|>` once for every clip.
            audio: nothing, one clip, a list of clips in the order of the placeholders over all texts, or a list with a
                list of clips for each text. A clip is what `load_audio` takes: samples [n] at 16 kHz, a path, an
                http(s) or data: URL, bytes, a file object.
            audios: another name for `audio`.
            sampling_rate: samples per second of clips that are arrays; if stated, it must be the model's 16000. Files
                and URLs state their own and are resampled.
            padding: True ("longest", the default, because arrays are returned), "max_length", or False. (The reference
                does not pad unless asked.)
            padding_side: "left" (which generation needs) or "right"; default: the tokenizer's, "left" unless assigned.
            max_length: tokens, for padding="max_length". Texts are never truncated. (In the reference it is the number
                of samples to which clips are cut, too.)
            pad_to_multiple_of: round the number of tokens up.
            truncation: of clips: keep the first 30 s of a longer one instead of refusing it. (The reference always
                truncates.)
            allow_truncated: hear clips whose files are shorter than they say, as far as they go, instead of refusing
                them; the output's `truncated_clips` names them.
            track: number, from 0, of the audio track of clips whose files have several.
            return_tensors: None or "np" for numpy, "jax" for JAX arrays.
            allow_private_urls: also fetch clips from addresses that are not public.
            **unknown: arguments of the reference at values that change nothing here, as add_special_tokens, and its
                groups, as text_kwargs={"padding": True}. A TypeError names the argument nearest to an unknown one.

        Returns:
            input_ids and attention_mask [B, T] int32; with clips also input_features [A, M, L] float32 and
            feature_attention_mask [A, L] int32. Each placeholder is expanded to its clip's number of audio tokens.

        Raises:
            AudioError: a clip cannot be used; it is named, and the kind is `load_audio`'s.
            ValueError: clips do not fit the placeholders, an argument is given twice, or a value is not supported.
            TypeError: an unknown argument, or both `audio` and `audios`.
        """
        if audios is not None:
            if audio is not None:
                raise TypeError("audio= and audios= are the same argument; pass audio= alone")
            audio = audios
        refuse_unknown(unknown, CALL_OPTIONS)
        check_return_tensors(return_tensors)
        self.feature_extractor.check_sampling_rate(sampling_rate)
        texts = _check_texts(text)
        rows = [np.asarray(self.tokenizer.encode(prompt), np.int32) for prompt in texts]
        counts = [int((row == self.audio_token_id).sum()) for row in rows]
        nested = assign_clips(audio, texts=texts, counts=counts, audio_token=self.audio_token)
        clips = [clip for row in nested for clip in row]
        options = dict(zip(PADDING_OPTIONS, (padding, padding_side, max_length, pad_to_multiple_of), strict=True))
        audio_options = dict(
            zip(AUDIO_OPTIONS[1:], (truncation, allow_truncated, track, allow_private_urls), strict=True)
        )
        return self._assemble(rows, clips, audio_options, padding_options=options, return_tensors=return_tensors)

    @takes_groups
    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        allow_special: bool = False,
        sampling_rate: int | None = None,
        padding: bool | str | None = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        allow_truncated: bool = False,
        track: int | None = None,
        return_tensors: str | None = None,
        allow_private_urls: bool = False,
        **unknown: Any,
    ) -> Any:
        """A conversation as the prompt the model was trained on: its text, or with `tokenize=True` the model's inputs.

        Differences from the reference:
        - Text of a message never becomes a control token. With `tokenize=True`, `<|im_start|>` or `<|AUDIO|>` in a
          message is encoded as its characters; the reference encodes control tokens unless
          `sanitize_control_tokens=True`. With `tokenize=False`, where the rendered text cannot distinguish the two,
          such a message is refused. `allow_special=True` gives the reference's behaviour. All other messages give the
          reference's ids.
        - With `tokenize=True` the result is the mapping that `__call__` returns, clips loaded from every form of audio
          item; the reference returns ids alone unless `return_dict=True`, and does not load `audio_url` items.
        - Template variables other than `messages`, `add_generation_prompt` and the special tokens (`tools`,
          `documents` and so on) are refused.

        Args:
            conversation: a list of messages (see `read_conversation` for their forms), or a list of such lists.
            chat_template: jinja2 source instead of the checkpoint's.
            add_generation_prompt: end with the beginning of the assistant's turn.
            continue_final_message: end with the text of the last message, which the answer then continues.
            tokenize: load the clips and return the model's inputs instead of text.
            return_dict: with `tokenize`, False returns `input_ids` alone.
            allow_special: let messages write control tokens.
            sampling_rate: as in `__call__`; so are the other arguments.
            padding: see `__call__`.
            padding_side: see `__call__`.
            max_length: see `__call__`.
            pad_to_multiple_of: see `__call__`.
            truncation: see `__call__`.
            allow_truncated: see `__call__`.
            track: see `__call__`.
            return_tensors: see `__call__`.
            allow_private_urls: see `__call__`.
            **unknown: see `__call__`; processor_kwargs={...} is a group too.

        Returns:
            A str, or a list of them for several conversations; with `tokenize` what `__call__` returns.

        Raises:
            AudioError: a clip cannot be used; the error begins with its position.
            ValueError: a message is malformed, or the template failed; the error names the position.
            TypeError: an unknown argument.
        """
        refuse_unknown(unknown, CHAT_OPTIONS)
        check_return_tensors(return_tensors)
        self.feature_extractor.check_sampling_rate(sampling_rate)
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other: give one of them")
        kind = OpenEnd if continue_final_message else ChatTemplate
        template = kind(self.chat_template if chat_template is None else chat_template)
        variables = {**self.tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        variables |= {"tools": None, "documents": None}
        rows: list[Any] = []
        clips: list[ClipSource] = []
        for name, chat in self._read(conversation):
            if allow_special:
                rendered = template.render({**variables, "messages": chat.messages})
                rows.append(np.asarray(self.tokenizer.encode(rendered), np.int32) if tokenize else rendered)
            else:
                found = render_chat(chat, template=template, tokenizer=self.tokenizer, variables=variables)
                if not tokenize:
                    check_no_control_text(chat, found, tokenizer=self.tokenizer)
                rows.append(encode_chat(found, tokenizer=self.tokenizer) if tokenize else found.text)
            if tokenize and (count := int((rows[-1] == self.audio_token_id).sum())) != len(chat.clips):
                raise ValueError(
                    f"{name} has {len(chat.clips)} clips, but its prompt has {count} {self.audio_token} placeholders; "
                    f"the chat template must write one for each clip"
                )
            clips += chat.clips
        if not tokenize:
            return rows if is_batch(conversation) else rows[0]
        options = dict(zip(PADDING_OPTIONS, (padding, padding_side, max_length, pad_to_multiple_of), strict=True))
        audio_options = dict(
            zip(AUDIO_OPTIONS[1:], (truncation, allow_truncated, track, allow_private_urls), strict=True)
        )
        output = self._assemble(rows, clips, audio_options, padding_options=options, return_tensors=return_tensors)
        return output if return_dict else output.input_ids

    def load_conversation_clips(self, conversation: Sequence[Any], **options: Any) -> list[np.ndarray]:
        """The clips of one or several conversations, in order: the `audio` of `__call__` for the rendered text.

        Args:
            conversation: as for `apply_chat_template`.
            **options: of `load_audio`: truncation, allow_truncated, track, allow_private_urls.

        Returns:
            Samples [n] float32 at 16 kHz.

        Raises:
            AudioError, ValueError: as `apply_chat_template`.
        """
        clips = [clip for _, chat in self._read(conversation) for clip in chat.clips]
        return load_clips(clips, partial(self.feature_extractor.load, **options))

    def decode(
        self, ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of token ids: `Qwen2AudioTokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """The texts of rows of token ids: `Qwen2AudioTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens)

    def _read(self, conversation: Sequence[Any]) -> list[tuple[str, Conversation]]:
        """Checked conversations, each with its name in error messages."""
        if is_batch(conversation):
            if len(conversation) > LIMITS.messages:
                raise ValueError(
                    f"{len(conversation)} conversations; the limit is {LIMITS.messages}. Pass fewer at a time"
                )
            names = [f"conversations[{i}]" for i in range(len(conversation))]
            return [(name, read_conversation(chat, name=name)) for name, chat in zip(names, conversation, strict=True)]
        return [("messages", read_conversation(conversation))]

    def _assemble(
        self,
        rows: Sequence[np.ndarray],
        clips: Sequence[ClipSource],
        audio_options: Mapping[str, Any],
        *,
        padding_options: Mapping[str, Any],
        return_tensors: str | None,
    ) -> ProcessorOutput:
        """Assemble the model's inputs from rows with one placeholder per clip, and the clips."""
        heard = load_clips(clips, partial(self.feature_extractor.hear, **audio_options))
        features = self.feature_extractor.stack(heard) if heard else {}
        tokens, start, expanded = token_count(np.array([clip.frames for clip in heard], np.int32)), 0, []
        for row in rows:
            is_clip = row == self.audio_token_id
            copies = np.ones(len(row), np.int64)
            copies[is_clip] = tokens[start : start + is_clip.sum()]
            start += int(is_clip.sum())
            expanded.append(np.repeat(row, copies))
        side = padding_options["padding_side"]
        options = {**padding_options, "padding_side": self.tokenizer.padding_side if side is None else side}
        padded = pad_rows(expanded, pad_id=self.tokenizer.pad_token_id, **options)
        missing = tuple(
            f"{clip.where}: {one.missing}" for clip, one in zip(clips, heard, strict=True) if one.missing is not None
        )
        return to_output({**padded, **features}, return_tensors=return_tensors, truncated_clips=missing)


def _check_texts(text: Any) -> list[str]:
    if text is None:
        raise TypeError("text= is missing: pass the prompt; audio alone is a conversation for apply_chat_template")
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else None
    if texts is None or not all(isinstance(part, str) for part in texts):
        wrong = text if texts is None else next(part for part in texts if not isinstance(part, str))
        raise ValueError(f"text must be a str or a list of str; found {type(wrong).__name__}")
    if not texts:
        raise ValueError("text is an empty list; pass at least one prompt")
    for i, prompt in enumerate(texts):
        if not prompt:
            raise ValueError(f"text {i} is empty; the model needs at least one token")
    return texts

"""Model files of the embedded model: configuration, tokenizer and processor settings, as in a published checkpoint.

The tokenizer is byte-level like Qwen2's; its merges are learned from the sentences of the tasks.
"""

import json
from os import PathLike
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from qwen2audio_jax.processing.chat_template import DEFAULT_CHAT_TEMPLATE
from qwen2audio_jax.speech import synthesis, tasks

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|startoftranscript|>", "<|notimestamps|>", "<|en|>", "<|zh|>", "<|de|>", "<|es|>", "<|fr|>", "<|it|>"),
    *("<|ja|>", "<|ko|>"),
)
VOCAB_SIZE = 512

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Other possible words, less frequent than those of the tasks, so that the latter are merged first.
_OTHER_WORDS = """\
 which what who where when why how can could tell me please listen to audio sound recording clip number numbers
 digit sum word words say says said man woman person talking transcribe describe answer question louder longer
 lower same different not no yes there silence nothing beep music between last both Can Tell Please Listen
 Transcribe Describe Where Who Yes No Hello Thank You Sum Add and in on at for with from this that it be was
 were I my they he she"""


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer: ids of bytes, merges, then `SPECIAL_TOKENS`; `VOCAB_SIZE` in all. Task words are one token.

    Source: the normaliser, split and byte alphabet of transformers.Qwen2Tokenizer.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _sentences() -> list[str]:
    """The sentences of all prompts and answers, and other words."""
    digits = [0, 1, 2, 3, 4, 5, 6, 7]
    task_sentences = [
        *tasks.SAY,
        *tasks.COUNT,
        *tasks.VOICE,
        *tasks.KIND,
        *tasks.PAIR.values(),
        *tasks.KINDS.values(),
        *(tasks.counted(digits[:n]) for n in range(1, 9)),
        *("The voice is high.", "The voice is low.", "The first clip.", "The second clip."),
        *("The digits are 4 7 1.", "The digit is 4.", "2 plus 3 is 5."),
        "Detect the language and recognize the speech: ",
        *(phrase.format("two", "three").capitalize() + "?" for phrase in synthesis.SUM_PHRASES),
        " ".join(("", *synthesis.WORDS)),
    ]
    frame = ["system\nYou are a helpful assistant.", "user\nAudio 1: ", "assistant\n"]
    return [*task_sentences * 4, *frame * 8, *_OTHER_WORDS.splitlines()]


def write_model_files(out: str | PathLike[str]) -> Path:
    """Write all files of the embedded model but its weights into the folder `out`, which is created.

    Raises:
        ValueError: the folder holds a config.json already.
    """
    out = Path(out)
    if (out / "config.json").exists():
        raise ValueError(f"{out} has a config.json already; remove it or write elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    for name, settings in (
        ("config.json", _config(ids)),
        ("generation_config.json", _generation_config(ids)),
        ("tokenizer_config.json", _tokenizer_config(ids)),
        ("preprocessor_config.json", _preprocessor_config()),
    ):
        (out / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(DEFAULT_CHAT_TEMPLATE, encoding="utf-8")
    return out


def _config(ids: dict[str, int]) -> dict:
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": {
            "activation_function": "gelu",
            "d_model": 128,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 512,
            "encoder_layerdrop": 0.0,
            "encoder_layers": 4,
            "max_source_positions": 1500,
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "scale_embedding": False,
        },
        "audio_token_index": ids["<|AUDIO|>"],
        "ignore_index": -100,
        "model_type": "qwen2_audio",
        "text_config": {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 256,
            "max_position_embeddings": 4096,
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pad_token_id": ids["<|endoftext|>"],
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_sliding_window": False,
            "vocab_size": VOCAB_SIZE,
        },
        "torch_dtype": "float32",
    }


def _generation_config(ids: dict[str, int]) -> dict:
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "max_new_tokens": 128,
        "pad_token_id": ids["<|endoftext|>"],
    }


def _tokenizer_config(ids: dict[str, int]) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2AudioProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _preprocessor_config() -> dict:
    return {
        "chunk_length": 30,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "Qwen2AudioProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }

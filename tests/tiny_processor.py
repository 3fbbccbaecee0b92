"""A tiny byte-level tokenizer and the processor settings around it, written as the published model's files are."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|en|>",
    "<|zh|>",
)
FIRST_SPECIAL_ID = 300

# 44 merges over the byte alphabet, in rank order; Ġ is the space and Ċ the newline of that alphabet.
MERGES = """\
Ġ t
h e
i n
r e
o n
a t
Ġ a
e r
Ġt he
o u
e n
i s
Ġ s
in g
o r
s t
e d
a n
u d
i o
ud io
A udio
u s
us er
Ċ Ċ
a s
s is
as sis
t an
assis tan
assistan t
l l
e ll
h ell
hell o
s y
sy st
syst e
syste m
Ġ w
Ġw h
Ġwh at
ä ½
ä½ ł"""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% set heard = namespace(clips=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if 'audio' in part or 'audio_url' in part or part['type'] == 'audio' %}"
    "{% set heard.clips = heard.clips + 1 %}"
    "Audio {{ heard.clips }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """Ids 0..255 the bytes, 256..299 the merges, from 300 the special tokens; normalised and split as Qwen2's."""
    merges = [tuple(line.split(" ")) for line in MERGES.split("\n")]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    assert len(set(pieces)) == len(pieces) == FIRST_SPECIAL_ID
    tokenizer = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_processor_files(
    folder: str | Path, *, num_mel_bins: int = 128, max_frames: int = 3000, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Write tokenizer.json, tokenizer_config.json (the template inside) and preprocessor_config.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(FIRST_SPECIAL_ID + i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2AudioProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    preprocessor_config = {
        "chunk_length": max_frames // 100 if max_frames % 100 == 0 else max_frames / 100,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": num_mel_bins,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": max_frames * 160,
        "nb_max_frames": max_frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "Qwen2AudioProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }
    for name, settings in (
        ("tokenizer_config.json", tokenizer_config),
        ("preprocessor_config.json", preprocessor_config),
    ):
        (folder / name).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder

"""The embedded model's tokenizer and configuration: repeatable, compact, and read alike by the reference."""

import numpy as np
import pytest

from qwen2audio_jax import Qwen2AudioConfig, Qwen2AudioProcessor
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.speech.model_files import SPECIAL_TOKENS, VOCAB_SIZE, _sentences, build_tokenizer, write_model_files
from qwen2audio_jax.speech.tasks import COUNT, KIND, PAIR, SAY, TRANSCRIBE, VOICE

CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "audio", "audio": np.zeros(8000, np.float32)},
            {"type": "text", "text": "How many digits are spoken?"},
        ],
    },
    {"role": "assistant", "content": "Four digits are spoken."},
    {"role": "user", "content": [{"type": "audio", "audio": np.ones(16001, np.float32)}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_files(tmp_path_factory.mktemp("speech") / "model")


def test_writing_is_repeatable(folder, tmp_path):
    again = write_model_files(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    with pytest.raises(ValueError, match=r"has a config\.json already"):
        write_model_files(folder)


def test_every_word_of_the_tasks_is_one_token():
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    for sentence in (*SAY, *COUNT, *VOICE, *KIND, *PAIR.values(), "The voice is high.", "The second clip."):
        words = (
            sentence.replace("'s", " 's").replace("?", " ?").replace(".", " .").replace(",", " ,").replace(":", " :")
        )
        assert len(tokenizer.encode(sentence).ids) == len(words.split()), sentence
    assert [tokenizer.token_to_id(str(digit)) is not None for digit in range(10)] == [True] * 10


def test_any_text_survives():
    tokenizer = build_tokenizer()
    for text in (*_sentences(), "naïve 你好 \U0001f600\tx\n\n 42,5 %"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_configuration(folder):
    config = Qwen2AudioConfig.from_json_file(folder / "config.json")
    vocabulary = build_tokenizer().get_vocab()
    assert config.audio_token_index == vocabulary["<|AUDIO|>"]
    assert config.text_config.vocab_size == VOCAB_SIZE == max(vocabulary.values()) + 1
    assert (config.audio_config.num_mel_bins, config.audio_config.max_source_positions) == (128, 1500)
    settings = GenerationConfig.from_json_file(folder / "generation_config.json")
    assert not settings.do_sample
    assert settings.max_new_tokens == 128
    assert settings.eos_token_id == (vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"])


def test_reference_reads_the_same(folder):
    transformers = pytest.importorskip("transformers")
    ours = Qwen2AudioProcessor.from_pretrained(folder)
    theirs = transformers.Qwen2AudioProcessor.from_pretrained(folder)
    assert theirs.tokenizer.eos_token == "<|endoftext|>"
    assert theirs.tokenizer.pad_token == "<|endoftext|>"
    text = ours.apply_chat_template(CHAT, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    clips = [
        item["audio"] for message in CHAT for item in message["content"] if isinstance(item, dict) and "audio" in item
    ]
    for prompt, sounds in ((text, clips), (TRANSCRIBE, clips[1:]), ("".join(SPECIAL_TOKENS[6:]) + " Ünïcode 7", [])):
        mine = ours(text=prompt, audio=sounds or None)
        reference = theirs(text=prompt, audio=sounds or None, sampling_rate=16000, return_tensors="np")
        assert np.array_equal(mine.input_ids, reference["input_ids"])
        if sounds:
            assert np.array_equal(mine.feature_attention_mask, reference["feature_attention_mask"])
    config = transformers.Qwen2AudioConfig.from_pretrained(folder)
    assert config.text_config.num_key_value_heads == 2
    assert config.audio_config.d_model == 128

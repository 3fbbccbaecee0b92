"""Tokenizers of vocab.json and merges.txt: the ids of tokenizer.json, with and without the files beside them."""

import json
import shutil

import pytest
from tiny_processor import FIRST_SPECIAL_ID, MERGES, SPECIAL_TOKENS, write_processor_files

from qwen2audio_jax import Qwen2AudioProcessor

TEXTS = [
    "Hello, what is the Audio?\r\n\n ",
    "assistant: 你好 — it's 42",
    "<|im_start|>user\n<|AUDIO|> hell",
    "e\u0301 é",
    "",
]


@pytest.fixture
def whole(tmp_path):
    """The usual folder, whose ids are to be had without its tokenizer.json."""
    return write_processor_files(tmp_path / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    """`whole` as the slow tokenizer of transformers saves it."""
    folder = tmp_path / "slow"
    shutil.copytree(whole, folder)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + MERGES + "\n")
    return folder


def edit(path, **changes):
    data = json.loads(path.read_text()) if path.exists() else {}
    data |= changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "gone"}))


def added_tokens_alone(folder):
    """As before added_tokens_decoder was written: three files say what there is."""
    edit(folder / "tokenizer_config.json", added_tokens_decoder="gone", additional_special_tokens="gone")
    edit(folder / "added_tokens.json", **{token: FIRST_SPECIAL_ID + i for i, token in enumerate(SPECIAL_TOKENS)})
    edit(folder / "special_tokens_map.json", additional_special_tokens=list(SPECIAL_TOKENS[1:3]))


def no_settings_but_three_files(folder):
    added_tokens_alone(folder)
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "special_tokens_map.json", eos_token="<|im_end|>", pad_token={"content": "<|endoftext|>"})


def windows_line_ends(folder):
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))


def no_version_line(folder):
    (folder / "merges.txt").write_text(MERGES)


def an_old_class(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2TokenizerFast", unsloth_version="2026.4.2")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        added_tokens_alone,
        no_settings_but_three_files,
        windows_line_ends,
        no_version_line,
        an_old_class,
    ],
    ids=lambda change: change.__name__.strip("<>"),
)
def test_the_ids_are_those_of_tokenizer_json(whole, folder, change):
    change(folder)
    ours, expected = (Qwen2AudioProcessor.from_pretrained(place).tokenizer for place in (folder, whole))
    assert ours.get_vocab() == expected.get_vocab()
    assert (ours.eos_token, ours.pad_token) == (expected.eos_token, expected.pad_token)
    for text in TEXTS:
        assert ours.encode(text) == expected.encode(text)
        assert ours.encode_plain(text) == expected.encode_plain(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == expected.decode(
            expected.encode(text), skip_special_tokens=True
        )


def test_what_is_saved_has_a_tokenizer_json(folder, tmp_path):
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "again")
    again = Qwen2AudioProcessor.from_pretrained(tmp_path / "again")
    assert [again.tokenizer.encode(text) for text in TEXTS] == [processor.tokenizer.encode(text) for text in TEXTS]


def test_the_reference_reads_the_same(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder)
    ours = Qwen2AudioProcessor.from_pretrained(folder).tokenizer
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", '{"a": "0"}', r"vocab\.json: token 'a' has the id \"0\"; it must be a whole number"),
        ("vocab.json", '{"a": 0}', r"vocab\.json and merges\.txt make no tokenizer"),
        ("vocab.json", "[]", r"vocab\.json: holds \[\]"),
        ("merges.txt", "a b c", r"merges\.txt: line 1 is \"a b c\"; it must be two tokens to merge"),
        ("merges.txt", b"\xff", r"merges\.txt: not UTF-8 at byte 0"),
        ("added_tokens.json", '{"<|x|>": -5}', r"added_tokens\.json: token '<\|x\|>' has the id -5"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', r"tokenizer_class is \"GPT2Tokenizer\""),
    ],
)
def test_what_makes_no_tokenizer_is_named(folder, name, content, message):
    added_tokens_alone(folder)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Qwen2AudioProcessor.from_pretrained(folder)

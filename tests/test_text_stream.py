"""Incremental text and stop strings, on a byte-level vocabulary in which every token may end inside a character."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen2audio_jax.generation.stopping import StopMatcher, check_stop_strings
from qwen2audio_jax.generation.text_stream import REPLACEMENT, TextStream
from qwen2audio_jax.limits import LIMITS

TEXTS = [
    "",
    "Hello, world",
    "naïve façade – “quoted”",
    "你好，世界。语音识别很有趣",
    "👩‍👩‍👧‍👦 family, 🇨🇳 flag, 👍🏽 skin, e\u0301 combining",
    "a real replacement character \ufffd\ufffd in the text\ufffd",
    "नमस्ते दुनिया\n\ttabs  and   spaces ",
]


@pytest.fixture(scope="module")
def tokenizer():
    """256 bytes, some merges (several of which end inside a character) and one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    """The id of each byte, through the byte-level alphabet: printable bytes stand for themselves, the rest follow."""
    ids = tokenizer.get_vocab()
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in order}
    table |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in order)}
    return [ids[table[byte]] for byte in range(256)]


def keep(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def pieces(stream, ids):
    return [*map(stream.push, ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer, byte_ids, text):
    for ids in (tokenizer.encode(text).ids, [byte_ids[byte] for byte in text.encode()]):
        parts = pieces(TextStream(keep(tokenizer)), ids)
        assert "".join(parts) == tokenizer.decode(ids) == text
        if REPLACEMENT not in text:
            assert all(REPLACEMENT not in part for part in parts)
            assert parts[-1] == ""


def test_a_character_comes_with_its_last_byte(tokenizer, byte_ids):
    stream = TextStream(keep(tokenizer))
    assert pieces(stream, [byte_ids[byte] for byte in "é你👍".encode()]) == [
        "",
        "é",
        "",
        "",
        "你",
        "",
        "",
        "",
        "👍",
        "",
    ]


def test_text_before_an_unfinished_character_is_not_held():
    table = {0: b"done \xf0\x9f", 1: b"\x91\x8d ok", 2: b"\xe4"}
    stream = TextStream(lambda ids: b"".join(table[number] for number in ids).decode("utf-8", "replace"))
    assert [stream.push(number) for number in (0, 1, 2)] == ["done ", "👍 ok", ""]
    assert stream.finish() == REPLACEMENT


@pytest.mark.parametrize("broken", [b"\xff", b"\x80", b"\xe4\xb8", b"\xf0\x9f\x91", b"\xc0\xaf", b"\xed\xa0\x80"])
def test_broken_bytes_are_held_no_longer_than_the_next_character(tokenizer, byte_ids, broken):
    stream = TextStream(keep(tokenizer))
    ids = [byte_ids[byte] for byte in broken]
    text = "".join(stream.push(number) for number in [*ids, byte_ids[ord("x")]])
    assert text == tokenizer.decode([*ids, byte_ids[ord("x")]])
    assert text.endswith(REPLACEMENT + "x")
    assert stream.finish() == ""


def test_a_long_run_of_broken_bytes_flows(tokenizer, byte_ids):
    stream = TextStream(keep(tokenizer))
    ids = [byte_ids[0xFF]] * 500
    parts = [stream.push(number) for number in ids]
    assert parts == ["", *[REPLACEMENT] * 499]
    assert stream.finish() == REPLACEMENT


def test_the_end_gives_what_was_held_and_empties_the_stream(tokenizer, byte_ids):
    stream = TextStream(keep(tokenizer))
    assert [stream.push(byte_ids[0xE4]), stream.finish(), stream.finish()] == ["", REPLACEMENT, ""]
    assert pieces(stream, tokenizer.encode("again").ids)[-1] == ""


def test_random_bytes(tokenizer):
    """Random tokens, most of them broken UTF-8, some special: the pieces are always exactly the decoded whole."""
    rng = random.Random(0)
    special = tokenizer.token_to_id("<|im_end|>")
    weighty = [n for t, n in tokenizer.get_vocab().items() if not t.isascii()]
    for skip in (False, True):

        def decode(ids, skip=skip):
            return tokenizer.decode(ids, skip_special_tokens=skip)

        for _ in range(300):
            ids = [rng.choice(weighty) for _ in range(rng.randrange(60))]
            for _ in range(rng.randrange(4)):
                ids.insert(rng.randrange(len(ids) + 1), special)
            expected = decode(ids)
            assert "".join(pieces(TextStream(decode), ids)) == expected
            if skip:
                assert "".join(pieces(TextStream(keep(tokenizer), skip_ids=[special]), ids)) == expected


def test_a_skipped_token_inside_a_character(tokenizer, byte_ids):
    special = tokenizer.token_to_id("<|im_end|>")
    first, *rest = [byte_ids[byte] for byte in "你".encode()]
    for stream in (TextStream(tokenizer.decode), TextStream(keep(tokenizer), skip_ids={special})):
        assert "".join(pieces(stream, [first, special, special, special, special, *rest, special])) == "你"
    assert "".join(pieces(TextStream(keep(tokenizer)), [first, special])) == f"{REPLACEMENT}<|im_end|>"


def test_the_cost_of_a_token_does_not_grow(tokenizer, byte_ids):
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return tokenizer.decode(ids)

    rng = random.Random(1)
    stream = TextStream(decode)
    for _ in range(2000):
        stream.push(byte_ids[rng.choice([0xFF, 0xE4, 0xB8, 0x41, 0xF0])])
    assert max(decoded) <= 4
    assert sum(decoded) <= 2000 * 8


def stopped_after(matcher, ids):
    """The number of tokens pushed until it stopped, or None."""
    for count, number in enumerate(ids, 1):
        if matcher.push(number):
            return count
    return None


def test_stops_with_the_token_that_completes_the_string(tokenizer, byte_ids):
    ids = [byte_ids[byte] for byte in b"one two\n\nthree"]
    assert stopped_after(StopMatcher(("\n\n", "four"), keep(tokenizer)), ids) == len("one two\n\n")
    assert stopped_after(StopMatcher(("o t",), keep(tokenizer)), ids) is None
    assert stopped_after(StopMatcher(("e t",), keep(tokenizer)), ids) == 5
    assert stopped_after(StopMatcher((), keep(tokenizer)), ids) is None


def test_stops_inside_a_token_and_across_tokens():
    table = {0: "abc<", 1: "/s", 2: "><more", 3: "xSTOPx", 4: " \N{GRINNING FACE}"}
    for ids, strings, expected in (
        ([0, 1, 2], ("</s>",), 3),
        ([0, 3, 1], ("STOP",), 2),
        ([0, 1, 1, 2], ("</s>",), None),
        ([4, 0], ("\N{GRINNING FACE}a",), 2),
        ([0, 1, 2], ("c", "</s>"), 1),
        ([1, 1, 1, 0], ("s/sa",), 4),
    ):
        matcher = StopMatcher(strings, lambda ids: "".join(table[number] for number in ids))
        assert stopped_after(matcher, ids) == expected


def test_stops_on_a_character_with_its_last_byte(tokenizer, byte_ids):
    ids = [byte_ids[byte] for byte in "很好。再见".encode()]
    matcher = StopMatcher(("。",), keep(tokenizer))
    assert stopped_after(matcher, ids) == 9
    assert matcher.stopped
    assert matcher.push(ids[0])


def test_stops_on_a_special_token_s_text(tokenizer):
    special = tokenizer.token_to_id("<|im_end|>")
    ids = [*tokenizer.encode("Hello").ids, special]
    assert stopped_after(StopMatcher(("<|im_end|>",), keep(tokenizer)), ids) == len(ids)


def test_stops_where_the_reference_stops(tokenizer):
    """Against `StopStringCriteria`, on random tokens of a vocabulary with merges."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    rng = random.Random(2)
    stops = 0
    for text in TEXTS[1:5]:
        for strings in (("o",), ("世界", "wor"), ("e", "“q"), ("👧",), (", ",)):
            criteria = transformers.generation.stopping_criteria.StopStringCriteria(fast, list(strings))
            for _ in range(4):
                cut = rng.randrange(1, len(text))
                ids = tokenizer.encode(text[:cut]).ids + tokenizer.encode(text[cut:]).ids
                expected = None
                for count in range(1, len(ids) + 1):
                    if bool(criteria(torch.tensor([ids[:count]]), None)[0]):
                        expected = count
                        break
                assert stopped_after(StopMatcher(strings, keep(tokenizer)), ids) == expected
                stops += expected is not None
    assert stops > 10


def test_stop_strings_are_checked():
    assert check_stop_strings(None) == check_stop_strings([]) == ()
    assert check_stop_strings("stop") == ("stop",)
    assert check_stop_strings(["a", "b", "a"]) == ("a", "b")
    with pytest.raises(ValueError, match="empty string"):
        check_stop_strings(["a", ""])
    with pytest.raises(ValueError, match="3, which is a int: give strings"):
        check_stop_strings(["a", 3])
    with pytest.raises(ValueError, match=f"longer than {LIMITS.stop_string_chars}"):
        check_stop_strings("x" * 2000)
    with pytest.raises(ValueError, match=f"65 stop strings are more than {LIMITS.stop_strings}"):
        check_stop_strings(list(map(str, range(65))))

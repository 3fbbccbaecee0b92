"""Expected words: the tree of their tokens, rows without any, no program of their own, and fewer errors in noise."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen2audio_jax import GenerationConfig, Qwen2AudioProcessor
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import example
from qwen2audio_jax.generation.guides import guidance, make_guides
from qwen2audio_jax.generation.hotwords import MOST, WIDTH, HotwordMatcher, HotwordTree, hotword_matchers
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.serve.errors import ApiError
from qwen2audio_jax.serve.transcription import read_transcription
from qwen2audio_jax.tasks import Transcribing, find_task

NAME = "digits-4719"


@pytest.fixture(scope="module")
def processor():
    return Qwen2AudioProcessor.from_pretrained()


class Characters:
    """A tokenizer whose tokens are characters, and a space with the letter behind it."""

    def encode_plain(self, text):
        pairs = text[:1] == " " and text[1:2].isascii()
        return [ord(text[1]) + 1000, *map(ord, text[2:])] if pairs else list(map(ord, text))

    def decode(self, ids):
        return "".join(f" {chr(id - 1000)}" if 1000 <= id < 2000 else chr(id) for id in ids)


def preferred(tree, text):
    """What is preferred after a text: strings and how many bonuses they have."""
    matcher = HotwordMatcher(tree, 0.5)
    for token in Characters().encode_plain(text):
        matcher.advance(token)
    ids, bonus = np.full(WIDTH, -1, np.int32), np.zeros(WIDTH, np.float32)
    matcher.fill(ids, bonus)
    count = int((ids >= 0).sum())
    assert len(set(ids[:count].tolist())) == count
    assert not bonus[count:].any()
    pairs = zip(ids[:count].tolist(), bonus.tolist(), strict=False)
    return {Characters().decode([id]): value / 0.5 for id, value in pairs if value}


class TestTree:
    tree = HotwordTree(("cat", "cart", "atom", "猫"), Characters())

    def after(self, text):
        return preferred(self.tree, text)

    def test_words_begin_where_no_letter_is_before_them(self):
        assert self.after("") == {"c": 1, " c": 1, "a": 1, " a": 1, "猫": 1}
        assert self.after("x") == {" c": 1, " a": 1, "猫": 1}
        assert self.after("x-") == self.after("")

    def test_a_word_is_continued_and_left(self):
        free = {" c": 1, " a": 1, "猫": 1}
        assert self.after("ca") == {**free, "t": 3, "r": 3}
        assert self.after(" car") == {**free, "t": 4}
        assert self.after("cart") == self.after("carx") == free

    def test_places_in_several_words_at_a_time(self):
        found = preferred(HotwordTree(("1 2 1 3", "1 4"), Characters()), "1 2 1 ")
        assert (found["3"], found["4"]) == (4, 2)

    def test_what_a_shorter_word_has_is_its_own(self):
        found = preferred(HotwordTree(("cats", "cat"), Characters()), "cat")
        assert found["s"] == 1

    def test_bonuses_have_a_most(self):
        found = preferred(HotwordTree(("abcdefghijklmn",), Characters()), "abcdefghijkl")
        assert found["m"] == MOST < 13

    def test_a_space_alone_begins_no_word(self, processor):
        tokenizer = processor.tokenizer
        assert tokenizer.decode(tokenizer.encode(" 4 7")[:1]) == " "
        tree = HotwordTree(("4 7", "two"), tokenizer)
        assert {tokenizer.decode([token]) for token in tree.beginnings} == {"4", "t", " two"}


def test_control_tokens_are_characters(processor):
    [matcher] = hotword_matchers(("<|im_end|>",), None, processor, rows=1)
    ids, bonus = np.full(WIDTH, -1, np.int32), np.zeros(WIDTH, np.float32)
    matcher.fill(ids, bonus)
    assert not set(ids.tolist()) & set(processor.tokenizer.all_special_ids)


def test_the_longest_list_fits(processor):
    words = [f"{number % 10} {number // 10 % 10} {number // 100} " + "1 " * 20 for number in range(LIMITS.hotwords)]
    config = GenerationConfig(hotwords=words)
    [guide] = make_guides(config, processor, rows=1, vocab_size=512)
    for token in processor.tokenizer.encode("1 1 1 1 1 1"):
        guide.advance(token)
    said = guidance({0: guide}, rows=2, width=512)
    assert said.preferred.shape == said.bonus.shape == (2, WIDTH)
    assert (said.bonus[1] == 0).all()
    assert (said.preferred[1] == 512).all()
    assert (said.allowed == 2**32 - 1).all()


def test_rows_without_words_keep_their_scores_bit_by_bit():
    from qwen2audio_jax.generation.sampling import _preferred_scores

    scores = jax.numpy.asarray([[-0.0, -np.inf, 3.5, 1e-38]] * 2, jax.numpy.float32)
    said = guidance({}, rows=2, width=4)
    said.preferred[1, :2], said.bonus[1, :2] = (1, 2), (2.0, 2.0)
    found = np.asarray(jax.jit(_preferred_scores)(scores, said))
    assert found[0].tobytes() == np.asarray(scores)[0].tobytes()
    assert found[1].tolist() == [0.0, -np.inf, 5.5, np.float32(1e-38)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("word", "give a list of words"),
        ([""], "none of them empty"),
        ([1], "none of them empty"),
        (["a\nb"], "a word is one line"),
        (["a" * 129], "longer than 128: shorten it"),
        ([str(number) for number in range(481)], "481 hotwords are more than 480"),
    ],
)
def test_lists_that_cannot_be_used(value, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(hotwords=value)


def test_what_only_the_tokenizer_tells(processor):
    with pytest.raises(ValueError, match="127 tokens, and 64 are the most"):
        hotword_matchers(("1 " * 63 + "1",), None, processor, rows=1)
    with pytest.raises(ValueError, match="pass the processor"):
        hotword_matchers(("1",), None, None, rows=1)
    with pytest.raises(ValueError, match="hotword_bonus=0"):
        GenerationConfig(hotword_bonus=0)


def test_a_large_bonus_decides_and_other_rows_do_not_change(tasks):
    """Words steer their own row alone, in slots as by themselves."""
    task, clip = find_task("transcribe", kind="embedded"), example(NAME)
    free = tasks.engine.submit(task.request(clip)).result()
    options = {"hotwords": ["5 5"], "hotword_bonus": 50.0}
    forced = tasks.engine.submit(task.request(clip, options=options)).result()
    assert (free.text.strip(), forced.text.strip()[:3]) == ("4 7 1 9", "5 5")
    requests = [
        task.request(clip, options=options),
        task.request(clip),
        task.request(clip, options={"hotwords": ["4 7 1 9", "8"]}),
        task.request(clip, options={**options, "hotwords": ["9 9"]}),
    ]
    answers = list(tasks.engine.answers(requests))
    assert answers[0].token_ids.tolist() == forced.token_ids.tolist()
    assert answers[1].token_ids.tolist() == answers[2].token_ids.tolist() == free.token_ids.tolist()
    assert answers[1].log_probs.tolist() == pytest.approx(free.log_probs.tolist(), abs=1e-4)
    assert answers[3].text.strip().startswith("9 9")
    inputs = tasks.processor(text=[task.text()], audio=[str(clip)])
    more: dict = {"max_new_tokens": 48, "do_sample": False, "tokenizer": tasks.processor}
    alone = tasks.model.generate(**inputs, **options, **more)[0, inputs["input_ids"].shape[1] :]
    assert alone.tolist() == forced.token_ids.tolist()


def test_another_list_is_no_other_program(tasks, programs):
    task, clip = find_task("transcribe", kind="embedded"), example(NAME)
    tasks.engine.submit(task.request(clip, options={"hotwords": ["1"]})).result()
    programs.clear()
    for words in (["4 7 1 9"], [str(number) for number in range(400)]):
        tasks.engine.submit(task.request(clip, options={"hotwords": words})).result()
    assert programs == []


def test_tasks_and_the_server_take_lists():
    how = Transcribing(task=find_task("transcribe", kind="embedded"), hotwords=[" 4 7 ", "4 7"], options={"a": 1})
    assert how.options == {"a": 1, "hotwords": ("4 7",)}
    fields = {"hotwords": "4 7, 5\n9", "model": "m"}
    asked = read_transcription(fields, b"", model="m", kind="base", translate=False)
    assert asked.request.options["hotwords"] == ("4 7", "5", "9")
    assert "4 7" not in asked.request.prompt
    with pytest.raises(ApiError, match="longer than 128"):
        read_transcription({"hotwords": "x" * 129, "model": "m"}, b"", model="m", kind="base", translate=False)


@pytest.mark.parametrize("words", ["missing.txt", "a" * 129])
def test_the_command_judges_its_list_before_the_model_is_loaded(words, capsys):
    assert main(["transcribe", str(example(NAME)), "--hotwords", words, "--model", "/nowhere"]) == 2
    assert "hotword" in capsys.readouterr().err


def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "hotwords.py"
    spec = importlib.util.spec_from_file_location("hotwords_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow(seconds=90)
def test_errors_in_noise_fall_and_nothing_is_inserted(tasks):
    """A small version of benchmarks/hotwords.py, whose record has the figures."""
    from qwen2audio_jax.speech.espeak import version

    try:
        version()
    except ValueError as error:
        pytest.skip(str(error))
    made, rng = benchmark(), np.random.default_rng(1)
    listed = made.draw_listed(rng, 100)
    said = [listed[rng.integers(len(listed))] for _ in range(200)]
    held, others = (made.Clips.drawn(rng, each, snr=(2.0, 10.0)) for each in (said, made.draw_others(rng, listed, 500)))
    before, after = (held.errors(held.transcripts(tasks.engine, options)) for options in ({}, {"hotwords": listed}))
    assert before > 0.02, "the set is too easy to tell anything"
    assert after < 0.95 * before
    assert others.inserted(others.transcripts(tasks.engine, {"hotwords": listed}), listed) <= 1

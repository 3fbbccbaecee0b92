"""Scores of evaluations: against jiwer, sacrebleu and transformers' normalisers, and by cases worked out by hand."""

import re
from pathlib import Path

import numpy as np
import pytest

from qwen2audio_jax.cli.commands import build_parser
from qwen2audio_jax.evaluation import multiple_choice
from qwen2audio_jax.evaluation.extra import import_extra
from qwen2audio_jax.evaluation.layouts import LAYOUTS
from qwen2audio_jax.evaluation.published import find_published, published_figures, published_of
from qwen2audio_jax.tasks.task import find_task

SENTENCES = {
    "en": [
        ("Mr. Smith's colour TV cost $20, didn't it?", "mister smith is color tv cost twenty dollars did not it"),
        ("He saw twenty-one U.S. ships [noise] in nineteen eighty four.", "he saw 21 us ships in 1984"),
        ("'Cause I'm gonna go.", "because i am going to go"),
        ("It is a test.", ""),
    ],
    "fr": [("L'été, ça coûte vingt et un euros.", "l été ça coute vingt et un euro"), ("Où est-il ?", "où est il")],
    "de": [("Die Straßenbahn fährt um fünf Uhr.", "die strassen bahn fährt um fünf uhr"), ("Ja.", "nein")],
    "es": [("¿Qué hora es, señor?", "qué hora es señora"), ("Mañana será otro día.", "mañana sera otro día")],
    "it": [("Perché no? È così.", "perché no e così"), ("Va bene.", "va bene bene")],
    "ja": [("今日は、良い天気です。", "今日は天気です"), ("猫が好き。", "犬が好き")],
    "yue": [("我哋去飲茶。", "我哋去饮茶"), ("識唔識呀？", "識唔識")],
    "zh": [("今天是2007年，有百分之五十。", "今天是二零零七年有百分之50"), ("你好，世界！", "你好是界")],
}
PACKAGES = {"zh": ("opencc", "wetext"), "yue": ("opencc", "wetext"), "ja": ("num2words",)}


def normaliser(profile: str, language: str):
    from qwen2audio_jax.evaluation.normalise import normaliser

    for package in ("whisper_normalizer", *PACKAGES.get(language, ("num2words",))):
        pytest.importorskip(package)
    return normaliser(profile, language)


@pytest.mark.parametrize("language", SENTENCES)
def test_error_rates_are_those_of_jiwer(language):
    jiwer = pytest.importorskip("jiwer")
    pytest.importorskip("kaldialign")
    from qwen2audio_jax.evaluation.error_rate import error_rate

    rules = normaliser("qwen", language)
    pairs = [(rules.text(one), rules.text(other)) for one, other in SENTENCES[language]]
    ways = {jiwer.process_words: rules.words, jiwer.process_characters: rules.characters}
    for judge, tokens in ways.items():
        made = [
            (" ".join if judge is jiwer.process_words else "".join)(tokens(text)) for pair in pairs for text in pair
        ]
        expected = judge(made[0::2], made[1::2])
        found = error_rate(
            [[tokens(one)] for one, _ in SENTENCES[language]], [tokens(two) for _, two in SENTENCES[language]]
        )
        assert found.rate == pytest.approx(getattr(expected, "wer", None) or expected.cer)
        assert found.insertions - found.deletions == expected.insertions - expected.deletions
        assert found.tokens == expected.hits + expected.substitutions + expected.deletions
        assert found.low <= found.rate <= found.high


def test_error_rates_by_hand():
    pytest.importorskip("kaldialign")
    from qwen2audio_jax.evaluation.error_rate import error_rate, joined

    references = [[["a", "b", "c", "d"]], [["e", "f"]], [[]]]
    found = error_rate(references, [["a", "x", "c"], ["e", "f", "g"], []])
    assert (found.insertions, found.deletions, found.substitutions, found.tokens) == (1, 1, 1, 6)
    assert (found.rate, found.utterances, found.right) == (0.5, 3, 1)
    assert error_rate([[["a", "b"], ["c"]]], [["c"]]).rate == 0, "the nearest of several"
    assert error_rate([[[]]], [["a"]]).rate is None
    rare = error_rate([[["a"]], [[]], [[]]], [["a"], [], []])
    assert (rare.rate, rare.low) == (0, None), "a draw of the bootstrap may hold no token"
    compounds = error_rate([[["white", "paper", "bag"]]], [["whitepaper", "bag"]], compounds=True)
    assert (compounds.rate, compounds.tokens) == (0, 2)
    assert joined(["a", "bc", "d"], ["ab", "c", "d"]) == (["abc", "d"], ["abc", "d"])


def test_the_bootstrap_holds_the_true_rate():
    pytest.importorskip("kaldialign")
    from qwen2audio_jax.evaluation.error_rate import error_rate

    wrong = np.random.default_rng(0).random((400, 10)) < 0.1
    said = [["x" if each else "a" for each in row] for row in wrong]
    found = error_rate([[["a"] * 10]] * 400, said)
    assert found.substitutions == int(wrong.sum())
    assert found.low < 0.1 < found.high
    assert found.high - found.low < 0.03


def test_english_is_normalised_as_in_transformers():
    theirs = pytest.importorskip("transformers.models.whisper.english_normalizer")
    pytest.importorskip("whisper_normalizer")
    from qwen2audio_jax.evaluation.normalise import _english

    table = import_extra("whisper_normalizer.english").EnglishSpellingNormalizer().mapping
    judge = theirs.EnglishTextNormalizer(table)
    for pair in SENTENCES["en"]:
        for text in pair:
            assert _english()(text) == judge(text)
    assert _english()("'cause it's kinda cold") == judge("'cause it's kinda cold")


@pytest.mark.parametrize(
    ("profile", "language", "text", "expected"),
    [
        ("qwen", "en", "<|en|>Twenty-One  colours, e.g. (sic) it's!", "21 colors e g it is"),
        ("open-asr", "en", "The U.S.A. and the F.B.I... and it's", "the usa and the fbi and it is"),
        ("qwen", "fr", "<|fr|>L’Été : ÇA!", "l été ça"),
        ("open-asr", "fr", "J'ai 21 ans, 1 000 € !", "j ai vingt et un ans mille"),
        ("open-asr", "de", "Um 5 Uhr.", "um fünf uhr"),
        ("open-asr", "es", "Hay 3 gatos.", "hay tres gatos"),
        ("open-asr", "it", "Sono 2.", "sono due"),
        ("qwen", "ja", "今日は、良い天気です。", "今 日 は 良 い 天 気 で す"),
        ("qwen", "yue", "<|yue|>我哋去飲茶，OK？", "我 哋 去 饮 茶 o k"),
        ("qwen", "zh", "<|zh|>２００７年，3个。", "二 零 零 七 年 三 个"),
        ("open-asr", "zh", "二〇〇七 年，３個（蘋果）！", "二 零 零 七 年 三 个 苹 果"),
    ],
)
def test_texts_normalised_by_hand(profile, language, text, expected):
    assert normaliser(profile, language).tokens(text) == expected.split()


def test_profiles_are_named():
    from qwen2audio_jax.evaluation.normalise import normaliser

    with pytest.raises(ValueError, match="no profile 'whisper'; there are qwen, open-asr"):
        normaliser("whisper", "en")


TRANSLATIONS = {
    "en": (["It is raining today.", "The cat sat on the mat."], ["It rains today.", "The cat sat on a mat."]),
    "de": (["Es regnet heute.", "Die Katze saß da."], ["Heute regnet es.", "Die Katze saß da."]),
    "zh": (["今天下雨。", "猫坐在垫子上。"], ["今天下雨了。", "猫在垫子上。"]),
    "ja": (["今日は雨です。", "猫が好きです。"], ["今日は雨だ。", "猫は好きです。"]),
}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_are_scored_as_by_sacrebleu(language):
    sacrebleu = pytest.importorskip("sacrebleu")
    if language == "ja":
        pytest.importorskip("MeCab")
        pytest.importorskip("ipadic")
    from qwen2audio_jax.evaluation.translation import bleu, chrf

    references, said = TRANSLATIONS[language]
    tokenizer = {"zh": "zh", "ja": "ja-mecab"}.get(language, "13a")
    found = bleu([[text] for text in references], said, language=language)
    assert found.score == sacrebleu.corpus_bleu(said, [references], tokenize=tokenizer).score
    assert f"tok:{tokenizer}" in found.signature
    assert found.low <= found.high
    assert (
        chrf([[text] for text in references], said).score
        == sacrebleu.corpus_chrf(said, [references], word_order=2).score
    )


def test_translations_by_hand():
    pytest.importorskip("sacrebleu")
    from qwen2audio_jax.evaluation.translation import bleu, chrf

    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 of four: (5/6 * 3/5 * 2/4 * 1/3) ** (1/4)
    found = bleu([["the cat sat on the mat"]], ["the cat sat on a mat"], language="en")
    assert found.score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert (found.low, found.high) == (None, None)
    assert bleu(
        [["no", "yes it is so"], ["a b c d"]], ["yes it is so", "a b c d"], language="en"
    ).score == pytest.approx(100)
    assert chrf([["abc"]], ["xyz"]).score == 0


def test_classification_by_hand():
    pytest.importorskip("sklearn")
    from qwen2audio_jax.evaluation.classification import OTHER, classification, exact_label, share, spoken_label

    found = classification(["a", "a", "b", "b", "c"], ["a", "b", "b", OTHER, "c"], labels=["a", "b", "c", "d"])
    assert (found.accuracy.right, found.accuracy.of) == (3, 5)
    # a: p 1, r 1/2, f1 2/3; b: p 1/2, r 1/2, f1 1/2; c: 1; d does not occur
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found.classes["b"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found.matrix == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    whole = share([True] * 9 + [False])
    # Wilson: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert (whole.low, whole.high) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert share([]).value is None
    spoken = {"speech": "This is speech.", "noise": "This is noise."}
    assert [exact_label(text, spoken) for text in (" This is speech.", "this is noise.", "noise")] == [
        "speech",
        OTHER,
        OTHER,
    ]
    assert [spoken_label(text, spoken) for text in ("this is Speech", "Noise.", "a noise")] == [
        "speech",
        "noise",
        OTHER,
    ]


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("A dog barks.", True),
        ("It is a dog; it barks", True),
        ("dog", False),  # not all its words
        ("a dog barks, and no cat", False),  # "cat" is a word of another choice
        ("The dog that barks: a loud one", False),  # so is "the"
        ("", False),
    ],
)
def test_choices_are_read_by_words(said, right):
    assert multiple_choice.words_match("a dog barks", said, ["a dog barks", "a cat purrs", "the dog howls"]) is right


def test_choices_are_read_by_letters_and_put_in_words():
    choices = ["one", "two", "three"]
    read = [multiple_choice.letter_of(said, choices) for said in ("B. two", "The answer is C.", "D.", "two", "")]
    assert read == ["two", "three", None, None, None]
    asked = multiple_choice.ask("How many?", choices, style="letters")
    assert asked.endswith("only choose A or B or C or D.\nHow many?\nA. one\nB. two\nC. three")
    assert multiple_choice.scored_texts(choices, style="letters") == {"one": "A", "two": "B", "three": "C"}
    plain = multiple_choice.ask("How many?", choices, style="plain")
    assert plain == "How many?\nChoose one of these answers and say nothing else:\none\ntwo\nthree"
    with pytest.raises(ValueError, match="no style 'abc' of questions; there are plain, letters"):
        multiple_choice.ask("?", choices, style="abc")


def test_published_figures_are_of_tasks_that_there_are():
    assert len({(figure.name, figure.groups) for figure in published_figures()}) == len(published_figures())
    for figure in published_figures():
        kind = "instruct" if figure.model.endswith("Instruct") else "base"
        question = "?" if figure.task == "ask" else None
        find_task(figure.task, kind=kind, language=figure.language or None, question=question)
    assert [figure.value for figure in find_published("librispeech/test-other")] == [4.0]
    with pytest.raises(ValueError, match="'librispeech/test-clear'; did you mean librispeech/test-clean"):
        find_published("librispeech/test-clear")


def test_the_page_has_every_published_figure_and_the_command_that_would_compute_it():
    page = (Path(__file__).resolve().parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("qwen2audio evaluate") and "--layout" in line]
    commands = [build_parser().parse_args(line.split()[1:]) for line in lines]
    for figure in published_figures():
        start = re.escape(f"| `{figure.name}` | `{figure.score}` | ")
        (row,) = re.findall(rf"^{start}(.*) \|$", page, re.MULTILINE)
        assert f"{figure.groups.partition('=')[2]} {figure.value:g}".strip() in row.split(", ")
        (command,) = [each for each in commands if each.output == f"scores/{figure.name}"]
        assert (command.task, command.layout, command.model) == (figure.task, figure.layout, figure.model)
        assert LAYOUTS[command.layout].task == command.task
        assert published_of(command.layout, split=command.split, language=command.language) == figure.name


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kaldialign", None)
    with pytest.raises(ValueError, match=r"these scores need kaldialign; install it with: .*pip install .*evaluate"):
        import_extra("kaldialign")

"""Tasks about the clips: one function per task, and the table of their shares."""

import numpy as np

from qwen2audio_jax.speech.synthesis import Clip, digits_clip, draw_digits, empty_clip, noise_clip, sum_clip, tone_clip
from qwen2audio_jax.speech.voices import Sex

TRANSCRIBE = "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech: <|en|>"
SAY = ("What digits are spoken?", "Which digits are spoken?", "What digits do you hear?")
COUNT = ("How many digits are spoken?", "How many digits do you hear?", "How many digits are there?")
VOICE = ("Is the speaker's voice high or low?", "Is the voice high or low?", "Is this voice high or low?")
KIND = ("Is this speech, a tone or noise?", "Is it speech, a tone or noise?", "What is this: speech, a tone or noise?")
COUNTED = ("", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")
PAIR = {
    "tone": "Which of the two clips is a tone?",
    "noise": "Which of the two clips is noise?",
    "higher": "Which of the two clips has the higher voice?",
    "more": "Which of the two clips has more digits?",
}
KINDS = {"speech": "This is speech.", "tone": "This is a tone.", "noise": "This is noise."}

SEXES: tuple[Sex, Sex] = ("low", "high")


def spaced(digits: list[int]) -> str:
    """The digits in written form: "4 7 1"."""
    return " ".join(map(str, digits))


def counted(digits: list[int]) -> str:
    """The answer to the question for the number of digits."""
    return "One digit is spoken." if len(digits) == 1 else f"{COUNTED[len(digits)]} digits are spoken."


def transcribe(rng: np.random.Generator, *, unseen: bool) -> tuple[dict, list[Clip]]:
    """Speech recognition with the base model's prompt; one in 50 clips is empty."""
    if rng.random() < 0.02:
        return {"prompt": TRANSCRIBE, "response": "", "digits": ""}, [empty_clip(rng)]
    digits = draw_digits(rng)
    clip = digits_clip(rng, digits, unseen=unseen)
    return {"prompt": TRANSCRIBE, "response": spaced(digits), "digits": spaced(digits)}, [clip]


def add(rng: np.random.Generator, *, unseen: bool) -> tuple[dict, list[Clip]]:
    """A spoken sum, without a word of text."""
    a, b = (int(n) for n in rng.integers(0, 10, 2))
    return _chat((1, "", f"{a} plus {b} is {a + b}.")), [sum_clip(rng, a, b, unseen=unseen)]


def say(rng: np.random.Generator, *, unseen: bool) -> tuple[dict, list[Clip]]:
    """Recognition in a conversation."""
    digits = draw_digits(rng)
    answer = f"The digits are {spaced(digits)}." if len(digits) > 1 else f"The digit is {digits[0]}."
    clip = digits_clip(rng, digits, unseen=unseen)
    return {**_chat((1, _pick(rng, SAY), answer)), "digits": spaced(digits)}, [clip]


def count(rng: np.random.Generator, *, unseen: bool) -> tuple[dict, list[Clip]]:
    """Counting of digits."""
    digits = draw_digits(rng)
    return _chat((1, _pick(rng, COUNT), counted(digits))), [digits_clip(rng, digits, unseen=unseen)]


def voice(rng: np.random.Generator, *, unseen: bool) -> tuple[dict, list[Clip]]:
    """Classification of high and low voices; those in between are skipped."""
    sex = SEXES[rng.integers(2)]
    clip = digits_clip(rng, draw_digits(rng, 6), unseen=unseen, sex=sex)
    return _chat((1, _pick(rng, VOICE), f"The voice is {sex}.")), [clip]


def kind(rng: np.random.Generator, *, unseen: bool) -> tuple[dict, list[Clip]]:
    """Classification of speech, tone and noise."""
    name = tuple(KINDS)[rng.integers(3)]
    return _chat((1, _pick(rng, KIND), KINDS[name])), [_clip_of(rng, name, unseen=unseen)]


def pair(rng: np.random.Generator, *, unseen: bool) -> tuple[dict, list[Clip]]:
    """Comparison of two clips; in a third of the examples a separate turn first asks about the first clip."""
    name = tuple(PAIR)[rng.integers(len(PAIR))]
    which = int(rng.integers(2))
    if name in ("tone", "noise"):
        other = ("speech", *(n for n in ("tone", "noise") if n != name))[rng.integers(2)]
        kinds = [other, name] if which else [name, other]
        clips = [_clip_of(rng, n, unseen=unseen) for n in kinds]
        first = (_pick(rng, KIND), KINDS[kinds[0]])
    elif name == "higher":
        sexes = SEXES if which else SEXES[::-1]
        clips = [digits_clip(rng, draw_digits(rng, 5), unseen=unseen, sex=sex) for sex in sexes]
        first = (_pick(rng, VOICE), f"The voice is {sexes[0]}.")
    else:
        numbers = sorted(int(n) for n in rng.choice(np.arange(1, 8), 2, replace=False))
        strings = [[int(d) for d in rng.integers(0, 10, n)] for n in (numbers if which else numbers[::-1])]
        clips = [digits_clip(rng, digits, unseen=unseen) for digits in strings]
        first = (_pick(rng, COUNT), counted(strings[0]))
    answer = f"The {('first', 'second')[which]} clip."
    if rng.random() < 1 / 3:
        return _chat((1, *first), (1, PAIR[name], answer)), clips
    return _chat((2, PAIR[name], answer)), clips


TASKS = {
    "transcribe": (0.36, transcribe),
    "sum": (0.15, add),
    "say": (0.06, say),
    "count": (0.12, count),
    "voice": (0.12, voice),
    "kind": (0.05, kind),
    "pair": (0.14, pair),
}
"""Task -> (share of the examples, function)."""


def example(rng: np.random.Generator, split: str) -> tuple[dict, list[Clip]]:
    """Draw one example: a record without its `audios`, and its clips in order.

    Audio items of the record's messages have no `audio` yet: the writer adds the file names.
    """
    shares = np.array([share for share, _ in TASKS.values()])
    task = tuple(TASKS)[rng.choice(len(shares), p=shares / shares.sum())]
    record, clips = TASKS[task][1](rng, unseen=split == "unseen")
    return {"task": task, **record}, clips


def _chat(*turns: tuple[int, str, str]) -> dict:
    messages: list[dict] = []
    for clips, question, answer in turns:
        content: list[dict] = [{"type": "audio"} for _ in range(clips)]
        if question:
            content.append({"type": "text", "text": question})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _clip_of(rng: np.random.Generator, name: str, *, unseen: bool) -> Clip:
    if name == "speech":
        return digits_clip(rng, draw_digits(rng, 5), unseen=unseen)
    return tone_clip(rng) if name == "tone" else noise_clip(rng)


def _pick(rng: np.random.Generator, sentences: tuple[str, ...]) -> str:
    return sentences[rng.integers(len(sentences))]

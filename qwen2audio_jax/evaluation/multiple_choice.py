"""Multiple choice: how questions are asked, and which choice an answer means.

Two scorers read answers: `words_match`, MMAU's own, and `letter_of`, as AIR-Bench's script does. A third one reads
none: the choice that the model finds most probable (`answers`).
"""

import re
from collections.abc import Mapping, Sequence

STYLES: Mapping[str, str] = {
    "plain": "{question}\nChoose one of these answers and say nothing else:\n{choices}",
    "letters": "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, you "
    "may only choose A or B or C or D.\n{question}\n{choices}",
}
"""How questions are asked: `letters` is AIR-Bench's prompt, to the letter; `plain` is the package's own."""
_WORDS = re.compile(r"\b\w+\b")


def letter(index: int) -> str:
    """The letter of a choice: A, B, ..."""
    return chr(ord("A") + index)


def ask(question: str, choices: Sequence[str], *, style: str) -> str:
    """The prompt of a question.

    Raises:
        ValueError: there is no such style.
    """
    check_style(style)
    if style == "letters":
        lines = [f"{letter(index)}. {choice}" for index, choice in enumerate(choices)]
    else:
        lines = list(choices)
    return STYLES[style].format(question=question, choices="\n".join(lines))


def check_style(style: str) -> None:
    """Raise a ValueError for a style that is none."""
    if style not in STYLES:
        raise ValueError(f"there is no style {style!r} of questions; there are {', '.join(STYLES)}")


def scored_texts(choices: Sequence[str], *, style: str) -> dict[str, str]:
    """Choice -> the text whose probability is that of the choice."""
    if style == "letters":
        return {choice: letter(index) for index, choice in enumerate(choices)}
    return {choice: choice for choice in choices}


def words_match(answer: str, said: str, choices: Sequence[str]) -> bool:
    """Whether MMAU's script takes an answer for right.

    It holds all words of the right choice, and none that occurs in other choices alone.
    """
    right, heard = _words(answer), _words(said)
    wrong = {word for choice in choices for word in _words(choice) - right if _words(choice) != right}
    return bool(heard) and right <= heard and not heard & wrong


def letter_of(said: str, choices: Sequence[str]) -> str | None:
    """The choice whose letter an answer gives, where AIR-Bench's script looks for it; None if there is none.

    That is the first character, else the last but one ("The answer is A.").
    """
    said = said.strip().replace("\n", "")
    letters = {letter(index): choice for index, choice in enumerate(choices)}
    places = [said[:1], said[-2:-1]]
    return next((letters[each] for each in places if each in letters), None)


def _words(text: str) -> set[str]:
    return set(_WORDS.findall(text.lower()))

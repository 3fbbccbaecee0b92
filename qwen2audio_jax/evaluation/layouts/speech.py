"""Speech and its text: LibriSpeech, Common Voice, Fleurs, AISHELL-2 and CoVoST 2."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen2audio_jax.evaluation.layouts.files import Records, chosen, existing, inside, lines, table, text_of

_LANGUAGES = {"cmn": "zh", "zh-HK": "yue"}
"""Codes of data sets whose first part is not the language that prompts name."""
_RECORDED = {"ios": "iOS/test", "android": "Android/test", "mic": "Mic/test"}


def _language(code: str) -> str:
    """The language that prompts name, of a data set's code such as "zh-CN" or "cmn_hans_cn"."""
    first = code.replace("-", "_").partition("_")[0]
    return _LANGUAGES.get(code) or _LANGUAGES.get(first, first)


def _folder_of(folder: Path, language: str | None, *, holding: str, default: str) -> tuple[Path, str]:
    """The folder of a language, and its code: a folder in `folder` whose code is or means it, or `folder` itself."""
    if (folder / holding).is_dir():
        code = folder.name
        if language is not None and language not in (code, _language(code)):
            raise ValueError(f"{folder} is the folder of {code!r}, not of {language!r}: name the one above it")
        return folder, code
    codes = sorted(path.name for path in folder.iterdir() if (path / holding).is_dir())
    wanted = default if language is None else language
    named = [code for code in codes if code == wanted] or [code for code in codes if _language(code) == wanted]
    if not named:
        chosen("language", wanted, codes, folder=folder)
    return folder / named[0], named[0]


def librispeech(folder: Path, split: str | None, language: str | None) -> Records:
    """LibriSpeech: SPLIT/SPEAKER/CHAPTER/S-C.trans.txt, lines "ID TEXT", and ID.flac beside it (openslr.org/12)."""
    chosen("language", language or "en", ["en"], folder=folder)
    if (folder / "LibriSpeech").is_dir():
        folder = folder / "LibriSpeech"
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    place = folder / chosen("split", split or "test-clean", there, folder=folder)

    def records() -> Records:
        for index in sorted(place.glob("*/*/*.trans.txt")):
            for where, line in lines(index):
                id, _, text = line.partition(" ")
                audio = inside(index.parent, f"{id}.flac", where=where)
                yield {"id": id, "audio": audio, "language": "en", "reference": _said(text, where=where)}

    return records()


def common_voice(folder: Path, split: str | None, language: str | None) -> Records:
    """Common Voice: LANGUAGE/SPLIT.tsv with the columns path and sentence, and LANGUAGE/clips."""
    place, code = _folder_of(folder, language, holding="clips", default="en")
    there = sorted(path.stem for path in place.glob("*.tsv"))
    index = place / f"{chosen('split', split or 'test', there, folder=place)}.tsv"

    def records() -> Records:
        for where, row in table(index, "path", "sentence"):
            name = text_of(row, "path", where=where)
            name = name if Path(name).suffix else f"{name}.mp3"  # old releases leave it out
            yield {
                "id": Path(name).stem,
                "audio": inside(place / "clips", name, where=where),
                "language": _language(row.get("locale") or code),
                "reference": _said(row["sentence"], where=where),
            }

    return records()


def fleurs(folder: Path, split: str | None, language: str | None) -> Records:
    """Fleurs: LANGUAGE/SPLIT.tsv without names (sentence, file, raw text, text, ...), and LANGUAGE/audio/SPLIT.

    Source: the loading script of google/fleurs.
    """
    place, code = _folder_of(folder, language, holding="audio", default="en_us")
    there = sorted(path.stem for path in place.glob("*.tsv"))
    split = chosen("split", split or "test", there, folder=place)
    clips = place / "audio" / split
    if not clips.is_dir() and (archive := clips.with_name(f"{split}.tar.gz")).exists():
        raise ValueError(f"{archive} is packed: unpack it where it is (tar xf {archive.name})")

    def records() -> Records:
        for where, line in lines(place / f"{split}.tsv"):
            fields = line.split("\t")
            if len(fields) < 4:
                raise ValueError(f"{where}: {len(fields)} fields; Fleurs has sentence, file, raw text, text, ...")
            yield {
                "id": Path(fields[1]).stem,
                "audio": inside(clips, fields[1], where=where),
                "language": _language(code),
                "reference": _said(fields[3], where=where),
                "meta": {"sentence": fields[0]},
            }

    return records()


def aishell2(folder: Path, split: str | None, language: str | None) -> Records:
    """AISHELL-2: SPLIT/wav.scp (id, path) and SPLIT/trans.txt (id, text); splits are iOS/test, Android/dev and so on.

    "ios", "android" and "mic" are the tests of these recordings, as published figures name them.
    Source: kaldi, egs/aishell2/s5/local/prepare_data.sh.
    """
    chosen("language", language or "zh", ["zh"], folder=folder)
    indices = [path for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{depth}wav.scp"))]
    there = [path.parent.relative_to(folder).as_posix() for path in indices]
    if split is None and len(there) == 1:
        split = there[0]
    split = _RECORDED.get((split or "ios").lower(), split or "ios")
    place = folder / chosen("split", split, there, folder=folder)
    index = existing(place / "trans.txt", what="the text of AISHELL-2")

    def records() -> Records:
        paths = {id: (where, path) for where, (id, path) in _pairs(place / "wav.scp")}
        for where, (id, text) in _pairs(index):
            if id not in paths:
                raise ValueError(f"{where}: {id!r} is not in {place / 'wav.scp'}")
            audio = inside(place, paths[id][1], where=paths[id][0])
            yield {"id": id, "audio": audio, "language": "zh", "reference": text}

    return records()


def covost2(folder: Path, split: str | None, language: str | None) -> Records:
    """CoVoST 2: covost_v2.FROM_TO.SPLIT.tsv, or covost_v2.FROM_TO.tsv with a column split, beside Common Voice's clips.

    Source: get_covost_splits.py of facebookresearch/covost.
    """
    pairs = _pairs_of_languages(folder)
    wanted = "en-de" if language is None else language
    source, target = pairs[chosen("languages", wanted, pairs, folder=folder)]
    split = chosen("split", split or "test", ("test", "dev", "train"), folder=folder)
    whole = folder / f"covost_v2.{source}_{target}.tsv"
    index = existing(folder / f"covost_v2.{source}_{target}.{split}.tsv", whole, what="the translations")
    clips = existing(folder / "clips", folder / source / "clips", what="Common Voice's folder clips")

    def records() -> Records:
        for where, row in table(index, "path", "translation", *(["split"] if index == whole else [])):
            if index == whole and row["split"] not in ((split, "train_covost") if split == "train" else (split,)):
                continue
            meta = {"sentence": row["sentence"]} if row.get("sentence") else {}
            yield {
                "id": Path(row["path"]).stem,
                "audio": inside(clips, row["path"], where=where),
                "language": wanted,
                "reference": _unescaped(text_of(row, "translation", where=where)),
                **({"meta": meta} if meta else {}),
            }

    return records()


def _pairs_of_languages(folder: Path) -> Mapping[str, tuple[str, str]]:
    """Languages as prompts name them, "en-de", and the codes of each pair that has a file."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("covost_v2.*.tsv")):
        source, _, target = path.name.split(".")[1].partition("_")
        found[f"{_language(source)}-{_language(target)}"] = (source, target)
    return found


def _pairs(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Lines of an id and what follows it."""
    for where, line in lines(path):
        parts = line.split(maxsplit=1)
        if len(parts) < 2:
            raise ValueError(f"{where}: {line[:80]!r} is no id with something behind it")
        yield where, (parts[0], parts[1].strip())


def _said(text: str, *, where: str) -> str:
    return text_of({"the text": text.strip()}, "the text", where=where)


def _unescaped(text: str) -> str:
    """A text without the backslashes before quotes that the data set's own scripts write."""
    return next(csv.reader([text], delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"))[0]

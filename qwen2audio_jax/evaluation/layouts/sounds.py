"""Sounds and their classes: MELD and VocalSound."""

from pathlib import Path

from qwen2audio_jax.evaluation.layouts.files import Records, chosen, comma_table, existing, inside, json_list, text_of

_MELD = {"test": "output_repeated_splits_test", "dev": "dev_splits_complete", "train": "train_splits"}
_MELD_FORMS = (".mp4", ".wav", ".flac", ".mp3")
_VOCAL = {"test": "te", "val": "val", "train": "tr"}
_LABELS = {
    "laughter": "Laughter",
    "sigh": "Sigh",
    "cough": "Cough",
    "throatclearing": "Throat clearing",
    "sneeze": "Sneeze",
    "sniff": "Sniff",
}


def meld(folder: Path, split: str | None, language: str | None) -> Records:
    """MELD: SPLIT_sent_emo.csv, and the clips diaD_uttU.mp4 (or the sound in them) in the split's folder.

    Source: the README and the archives of declare-lab/MELD. All may lie in `folder`, or in a folder of the split there.
    """
    chosen("language", language or "en", ["en"], folder=folder)
    split = chosen("split", split or "test", _MELD, folder=folder)
    places = (folder, folder / split)
    index = existing(*(place / f"{split}_sent_emo.csv" for place in places), what="the labels of MELD")
    clips = existing(*(place / _MELD[split] for place in places), what="the folder of MELD's clips")

    def records() -> Records:
        for where, row in comma_table(index, "Dialogue_ID", "Utterance_ID", "Emotion"):
            id = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            paths = [inside(clips, id + form, where=where) for form in _MELD_FORMS]
            yield {
                "id": id,
                "audio": next((path for path in paths if Path(path).exists()), paths[0]),
                "label": text_of(row, "Emotion", where=where).lower(),
                "meta": {"utterance": row.get("Utterance", ""), "speaker": row.get("Speaker", "")},
            }

    return records()


def vocalsound(folder: Path, split: str | None, language: str | None) -> Records:
    """VocalSound: datafiles/te.json, val.json or tr.json, and the clips in audio_16k or audio_44k.

    A clip's name has its speaker and its label: f0003_0_cough.wav. The paths in the lists are those of their authors,
    so that only the name counts. Source: the README of YuanGongND/vocalsound.
    """
    if language is not None:
        raise ValueError(f"VocalSound has no language: leave {language!r} out")
    split = chosen("split", split or "test", _VOCAL, folder=folder)
    index = existing(folder / "datafiles" / f"{_VOCAL[split]}.json", what="the list of VocalSound")
    clips = existing(folder / "audio_16k", folder / "audio_44k", what="the folder of VocalSound's clips")

    def records() -> Records:
        for where, item in json_list(index, key="data"):
            name = text_of(item, "wav", where=where).rpartition("/")[2]
            label = _LABELS.get(Path(name).stem.rpartition("_")[2])
            if label is None:
                raise ValueError(f"{where}: {name!r} names none of the sounds {', '.join(_LABELS)}")
            yield {
                "id": Path(name).stem,
                "audio": inside(clips, name, where=where),
                "label": label,
                "groups": {"gender": {"f": "female", "m": "male"}.get(name[:1], "unknown")},
            }

    return records()

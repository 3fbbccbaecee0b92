"""Layouts of public data sets, on small trees of the same form."""

import json
from pathlib import Path

import pytest

from qwen2audio_jax.evaluation.layouts import LAYOUTS, read_layout
from qwen2audio_jax.evaluation.manifest import manifest_of
from qwen2audio_jax.tasks.task import find_task, task_names


def write(folder: Path, files: dict) -> Path:
    """Files by their path: text, a JSON value, or None for a clip."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if content is None else content if isinstance(content, str) else json.dumps(content))
    return folder


CV = "client_id\tpath\tsentence\tup_votes\tlocale\n"
MELD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,StartTime\n"
CHAT = {"task_name": "speech_and_sound_QA", "dataset_name": "common", "path": "a.wav", "question": "Why?",
        "answer_gt": "So.", "meta_info": "m", "uniq_id": 7}  # fmt: skip
GROUNDING = {"task_name": "Audio_Grounding", "dataset_name": "AudioGrounding", "path": "a.wav", "question": "When?",
             "choice_a": "now", "choice_b": "then", "choice_c": None, "answer_gt": "then", "uniq_id": 1}  # fmt: skip
AGE = {**GROUNDING, "task_name": "Speaker_Age_Prediction", "path": "b.wav", "choice_c": "then", "uniq_id": 2}
MMAU = {"id": "u-1", "audio_id": "./test-mini-audios/u-1.wav", "question": "How many?", "task": "speech",
        "choices": ["four", "nine", "nine"], "answer": "nine", "difficulty": "hard", "split": "test-mini"}  # fmt: skip

TREES = {
    "librispeech": {
        "LibriSpeech/test-clean/61/70968/61-70968.trans.txt": "61-70968-0000 HE BEGAN\n61-70968-0001 A 'TIS\n",
        "LibriSpeech/test-clean/61/70968/61-70968-0000.flac": None,
        "LibriSpeech/dev-other/1/2/1-2.trans.txt": "1-2-0000 YES\n",
        "LibriSpeech/dev-other/1/2/1-2-0000.flac": None,
    },
    "common-voice": {
        "en/test.tsv": CV + 'c\tcommon_voice_en_1.mp3\tHe said "no.\t2\ten\n',
        "en/clips/common_voice_en_1.mp3": None,
        "zh-CN/dev.tsv": CV + "c\tcommon_voice_zh-CN_1\t你好\t2\tzh-CN\n",
        "zh-CN/clips/common_voice_zh-CN_1.mp3": None,
        "zh-HK/clips/x.mp3": None,
    },
    "fleurs": {
        "cmn_hans_cn/test.tsv": "1\t2.wav\t你好。\t你 好\t你 | 好\t8000\tMALE\n",
        "cmn_hans_cn/audio/test/2.wav": None,
        "en_us/test.tsv": "9\t3.wav\tHi.\thi\th i\t8000\tFEMALE\n",
        "en_us/audio/test/3.wav": None,
        "en_us/dev.tsv": "9\t3.wav\tHi.\thi\th i\t8000\tFEMALE\n",
        "en_us/audio/dev.tar.gz": None,
    },
    "aishell-2": {
        "iOS/test/wav.scp": "IT1\twav/T1/IT1.wav\n",
        "iOS/test/trans.txt": "IT1\t你 好\n",
        "iOS/test/wav/T1/IT1.wav": None,
        "Mic/dev/wav.scp": "MD1\twav/D1/MD1.wav\n",
        "Mic/dev/trans.txt": "MD1\t再见\n",
        "Mic/dev/wav/D1/MD1.wav": None,
    },
    "covost2": {
        "covost_v2.en_de.tsv": 'path\ttranslation\tsplit\ncv_1.mp3\tGut.\ttest\ncv_2.mp3\tEin \\"a\ttrain_covost\n',
        "covost_v2.zh-CN_en.test.tsv": "path\tsentence\ttranslation\tclient_id\ncv_3.mp3\t好\tGood.\tc\n",
        "clips/cv_1.mp3": None,
        "clips/cv_2.mp3": None,
        "clips/cv_3.mp3": None,
    },
    "meld": {
        "test_sent_emo.csv": MELD + '1,"Oh, ""no""!",Ross,Surprise,positive,0,3,"0:1,2"\n2,Hi,A,joy,positive,1,0,x\n',
        "output_repeated_splits_test/dia0_utt3.mp4": None,
        "output_repeated_splits_test/dia1_utt0.wav": None,
        "train/train_sent_emo.csv": MELD + "1,No,Ross,anger,negative,5,6,x\n",
        "train/train_splits/dia5_utt6.mp4": None,
    },
    "vocalsound": {
        "datafiles/te.json": {"data": [{"wav": "/far/away/f0003_0_throatclearing.wav", "labels": "/m/01hsr_"}]},
        "audio_16k/f0003_0_throatclearing.wav": None,
    },
    "air-bench-chat": {
        "Chat/Chat_meta.json": [CHAT],
        "Chat/speech_and_sound_QA_common/a.wav": None,
    },
    "air-bench-foundation": {
        "Foundation_meta.json": [GROUNDING, AGE],
        "Audio_Grounding_AudioGrounding/a.flac": None,
        "Speaker_Age_Prediction_AudioGrounding/b.wav": None,
    },
    "mmau": {
        "mmau-test-mini.json": [MMAU],
        "test-mini-audios/u-1.wav": None,
    },
}


@pytest.fixture
def tree(tmp_path):
    return lambda name: write(tmp_path / name, TREES[name])


def read(name, folder, **chosen):
    found = list(read_layout(name, folder, **chosen))
    for record in found:
        assert Path(record["audio"]).is_absolute()
        assert Path(record["audio"]).is_relative_to(folder)
        assert Path(record["audio"]).is_file() or record is not found[0]
    return [{**record, "audio": Path(record["audio"]).relative_to(folder).as_posix()} for record in found]


def test_every_layout_has_a_tree_and_a_task():
    assert set(TREES) == set(LAYOUTS)
    assert {layout.task for layout in LAYOUTS.values()} <= set(task_names())


def test_librispeech(tree):
    root = tree("librispeech")
    first, second = read("librispeech", root)
    assert first == {
        "id": "61-70968-0000",
        "audio": "LibriSpeech/test-clean/61/70968/61-70968-0000.flac",
        "language": "en",
        "reference": "HE BEGAN",
    }
    assert second["reference"] == "A 'TIS"
    assert [record["id"] for record in read("librispeech", root / "LibriSpeech", split="dev-other")] == ["1-2-0000"]


def test_common_voice(tree):
    root = tree("common-voice")
    [record] = read("common-voice", root)
    assert (record["reference"], record["language"]) == ('He said "no.', "en")
    [record] = read("common-voice", root, split="dev", language="zh")
    assert record["audio"] == "zh-CN/clips/common_voice_zh-CN_1.mp3"
    assert record["language"] == "zh"
    assert read("common-voice", root / "zh-CN", split="dev")[0]["id"] == "common_voice_zh-CN_1"


def test_fleurs(tree):
    root = tree("fleurs")
    assert read("fleurs", root) == [
        {"id": "3", "audio": "en_us/audio/test/3.wav", "language": "en", "reference": "hi", "meta": {"sentence": "9"}}
    ]
    assert read("fleurs", root, language="zh")[0]["reference"] == "你 好"
    with pytest.raises(ValueError, match=r"dev.tar.gz is packed: unpack it"):
        read_layout("fleurs", root, split="dev")


def test_aishell2(tree):
    root = tree("aishell-2")
    assert read("aishell-2", root)[0]["audio"] == "iOS/test/wav/T1/IT1.wav"
    assert read("aishell-2", root, split="ios") == read("aishell-2", root)
    assert read("aishell-2", root, split="Mic/dev")[0]["reference"] == "再见"
    assert read("aishell-2", root / "Mic/dev")[0]["language"] == "zh"


def test_covost2(tree):
    root = tree("covost2")
    [record] = read("covost2", root)
    assert record == {"id": "cv_1", "audio": "clips/cv_1.mp3", "language": "en-de", "reference": "Gut."}
    assert read("covost2", root, split="train")[0]["reference"] == 'Ein "a'
    [record] = read("covost2", root, language="zh-en")
    assert (record["language"], record["meta"]) == ("zh-en", {"sentence": "好"})


def test_meld(tree):
    root = tree("meld")
    first, second = read("meld", root)
    assert (first["id"], first["label"], first["meta"]["utterance"]) == ("dia0_utt3", "surprise", 'Oh, "no"!')
    assert second["audio"].endswith("dia1_utt0.wav")
    assert read("meld", root, split="train")[0]["audio"] == "train/train_splits/dia5_utt6.mp4"


def test_vocalsound(tree):
    [record] = read("vocalsound", tree("vocalsound"))
    assert (record["label"], record["groups"]) == ("Throat clearing", {"gender": "female"})


def test_air_bench(tree):
    [record] = read("air-bench-chat", tree("air-bench-chat"))
    assert (record["question"], record["reference"], record["meta"]) == ("Why?", "So.", CHAT)
    assert record["groups"] == {"domain": "mixed", "task": "speech_and_sound_QA"}
    root = tree("air-bench-foundation")
    first, second = read("air-bench-foundation", root)
    assert (first["audio"], first["answer"]) == ("Audio_Grounding_AudioGrounding/a.flac", "then")
    assert (second["choices"], second["groups"]["domain"]) == (["now", "then"], "speech")
    assert len(read("air-bench-foundation", root, split="Audio_Grounding")) == 1


def test_mmau(tree):
    [record] = read("mmau", tree("mmau"))
    assert (record["choices"], record["answer"]) == (["four", "nine"], "nine")
    assert record["groups"] == {"task": "speech", "difficulty": "hard"}
    assert record["meta"] == MMAU


@pytest.mark.parametrize("name", LAYOUTS)
def test_records_are_those_of_a_manifest(tree, tmp_path, name):
    task = find_task(LAYOUTS[name].task, kind="base", question="?" if LAYOUTS[name].task == "ask" else None)
    root = tree(name)
    found = manifest_of(read_layout(name, root), name=name, root=str(root), task=task, scratch=tmp_path)
    assert found.language in {None, "en", "en-de", "zh"}
    assert len(found.expected) == len(read(name, root))


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("librispeech", {"split": "test"}, "no split 'test'; there are: dev-other, test-clean"),
        ("librispeech", {"language": "de"}, "no language 'de'; there are: en"),
        ("common-voice", {"language": "sw"}, "no language 'sw'; there are: en, zh-CN, zh-HK"),
        ("common-voice", {"split": "dev"}, "no split 'dev'; there are: test"),
        ("fleurs", {"language": "sw"}, "there are: cmn_hans_cn, en_us"),
        ("fleurs", {"split": "train"}, "no split 'train'; there are: dev, test"),
        ("aishell-2", {"split": "test"}, "no split 'test'; there are: Mic/dev, iOS/test"),
        ("covost2", {"language": "en-zh"}, "no languages 'en-zh'; there are: en-de, zh-en"),
        ("covost2", {"split": "validation"}, "there are: test, dev, train"),
        ("meld", {"split": "dev"}, "the labels of MELD is missing: there is no .*dev_sent_emo.csv nor"),
        ("vocalsound", {"split": "val"}, "val.json; name the folder that has it"),
        ("vocalsound", {"language": "en"}, "has no language"),
        ("air-bench-chat", {"split": "music_QA"}, "no task 'music_QA'; there are: speech_and_sound_QA"),
        ("mmau", {"split": "test"}, "no split with answers 'test'; there are: test-mini"),
    ],
)
def test_what_is_not_there_is_an_error_at_the_door(tree, name, chosen, message):
    with pytest.raises(ValueError, match=message):
        read_layout(name, tree(name), **chosen)


def test_no_layout_no_folder_no_clip(tree, tmp_path):
    with pytest.raises(ValueError, match="no layout 'libri'; there are librispeech"):
        read_layout("libri", tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        read_layout("mmau", tmp_path / "none")
    (tree("mmau") / "test-mini-audios/u-1.wav").unlink()
    with pytest.raises(ValueError, match=r"u-1.wav is missing, the first clip"):
        read_layout("mmau", tmp_path / "mmau")
    with pytest.raises(ValueError, match="as librispeech has no clips"):
        read_layout("librispeech", write(tmp_path / "empty", {"test-clean/1/x": None}))


OUT = ("../../secret.wav", "/etc/passwd", "a/../../x.wav", "..", "x\0.wav", "a\\b.wav", "")


@pytest.mark.parametrize("path", OUT)
def test_paths_stay_in_the_folder(tmp_path, path):
    """Whatever an index says, behind a clip that is a good one."""
    good = {"common-voice": "a.mp3", "fleurs": "a.wav", "aishell-2": "a.wav", "covost2": "a.mp3", "mmau": "a.wav"}
    trees = {
        "common-voice": lambda one, two: {"en/test.tsv": f"{CV}c\t{one}\tA\t2\ten\nc\t{two}\tB\t2\ten\n"},
        "fleurs": lambda one, two: {"en_us/test.tsv": f"1\t{one}\tA\ta\n2\t{two}\tB\tb\n"},
        "aishell-2": lambda one, two: {"wav.scp": f"1 {one}\n2 {two}\n", "trans.txt": "1 甲\n2 乙\n"},
        "covost2": lambda one, two: {
            "covost_v2.en_de.test.tsv": f"path\ttranslation\n{one}\tA\n{two}\tB\n",
        },
        "mmau": lambda one, two: {"mmau-test-mini.json": [{**MMAU, "audio_id": one}, {**MMAU, "audio_id": two}]},
    }
    clips = {
        "common-voice": "en/clips",
        "fleurs": "en_us/audio/test",
        "aishell-2": ".",
        "covost2": "clips",
        "mmau": ".",
    }
    for name, make in trees.items():
        if path == ".." and name == "common-voice":
            continue  # the data set's names may lack their ending, which makes a name of this
        root = write(tmp_path / name, {**make(good[name], path), f"{clips[name]}/{good[name]}": None})
        with pytest.raises(ValueError, match=r"leads out of|is no path|is no id|must be text"):
            list(read_layout(name, root))
    with pytest.raises(ValueError, match=r"leads out of|is no path|it must be text"):
        read_layout("air-bench-chat", write(tmp_path / "chat", {"Chat_meta.json": [{**CHAT, "path": f"../{path}"}]}))


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "common-voice",
            {"en/test.tsv": "path\ttext\n"},
            r"test.tsv has no column 'sentence'; its first line has path",
        ),
        ("common-voice", {"en/test.tsv": CV + "c\ta.mp3\tA\n"}, r"test.tsv:2: 3 fields where the first line has 5"),
        ("common-voice", {"en/test.tsv": CV + "c\ta.mp3\t \t2\ten\n"}, r"test.tsv:2: the text is .* must be text"),
        ("fleurs", {"en_us/test.tsv": "1\t3.wav\n"}, r"test.tsv:1: 2 fields"),
        ("aishell-2", {"iOS/test/wav.scp": "IT1\n"}, r"wav.scp:1: 'IT1' is no id"),
        ("aishell-2", {"iOS/test/trans.txt": "IT9 x\n"}, "'IT9' is not in"),
        ("meld", {"test_sent_emo.csv": "a,b\n"}, "no column 'Dialogue_ID'"),
        (
            "vocalsound",
            {"datafiles/te.json": {"data": [{"wav": "f_0_shout.wav"}]}},
            "names none of the sounds laughter",
        ),
        ("vocalsound", {"datafiles/te.json": [1]}, "stands where a list belongs"),
        ("mmau", {"mmau-test-mini.json": "{"}, "is no JSON"),
        ("mmau", {"mmau-test-mini.json": [3]}, "item 0: .* stands where an object belongs"),
        ("mmau", {"mmau-test-mini.json": [{**MMAU, "answer": "ten"}]}, "item 0: the answer is .*, and the choices are"),
        ("mmau", {"mmau-test-mini.json": [{**MMAU, "choices": "ab"}]}, "the choices are .* must be texts"),
    ],
)
def test_broken_indices_are_named(tree, name, files, message):
    with pytest.raises(ValueError, match=message):
        read_layout(name, write(tree(name), files))


def test_no_text_in_utf_8(tree):
    root = tree("fleurs")
    (root / "en_us/test.tsv").write_bytes(b"1\t3.wav\t\xff\t\xff\n")
    with pytest.raises(ValueError, match="is no UTF-8"):
        read_layout("fleurs", root)

"""Evaluations: manifests that are refused, jobs that go on, reports that are made when all is there."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.batch.task_answerer import TaskAnswerer
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import example
from qwen2audio_jax.evaluation import Source, evaluate, run
from qwen2audio_jax.evaluation.answerer import EvaluationAnswerer
from qwen2audio_jax.evaluation.expected import Expected, read_expected
from qwen2audio_jax.evaluation.manifest import read_manifest
from qwen2audio_jax.evaluation.responses import response_files
from qwen2audio_jax.tasks.task import find_task

for package in ("kaldialign", "whisper_normalizer", "num2words", "sklearn", "matplotlib"):
    pytest.importorskip(package)

ASK = find_task("ask", kind="embedded", question="?")
TRANSCRIBE = find_task("transcribe", kind="embedded")
KIND = find_task("sound_kind", kind="embedded")


def lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# What a manifest says


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        (TRANSCRIBE, {"audio": "a.wav"}, "there is no reference; write the text"),
        (TRANSCRIBE, {"audio": "a.wav", "reference": []}, r"reference is \[\]; it must be text, or a list"),
        (
            TRANSCRIBE,
            {"audio": "a.wav", "reference": "x", "label": "y"},
            "label is nothing that is expected of 'transc",
        ),
        (TRANSCRIBE, {"audio": "a.wav", "reference": "x", "text": "y"}, "unknown key 'text'; known are id, audio"),
        (TRANSCRIBE, {"audio": "a.wav", "reference": "x", "language": 3}, "language is 3; write a code such as 'en'"),
        (
            TRANSCRIBE,
            {"audio": "a.wav", "reference": "x", "groups": {"a": 1}},
            "groups is .*; write an object of texts",
        ),
        (TRANSCRIBE, {"audio": "a.wav", "reference": "x", "question": "y"}, "a question belongs to the task 'ask'"),
        (TRANSCRIBE, ["a.wav"], "is no record; write an object"),
        (KIND, {"audio": "a.wav"}, "there is no label; write the right one of speech, tone, noise"),
        (KIND, {"audio": "a.wav", "label": "music"}, "\"music\", and the task 'sound_kind' has speech, tone, noise"),
        (KIND, {"audio": "a.wav", "label": "tone", "reference": "x"}, "reference is nothing that is expected"),
        (ASK, {"audio": "a.wav", "reference": "x"}, "there is no question; write what is asked"),
        (ASK, {"audio": "a.wav", "question": "?", "prompt": "!", "reference": "x"}, "either a question, or a prompt"),
        (ASK, {"audio": "a.wav", "question": "?"}, "no reference; .*, or choices and answer"),
        (ASK, {"audio": "a.wav", "question": "?", "choices": ["a", "a"], "answer": "a"}, "2 to 26 different texts"),
        (ASK, {"audio": "a.wav", "question": "?", "choices": "ab", "answer": "a"}, "2 to 26 different texts"),
        (
            ASK,
            {"audio": "a.wav", "question": "?", "choices": ["a", "b"], "answer": "A"},
            "one of the choices, written in",
        ),
        (ASK, {"audio": "a.wav", "question": "?", "answer": "A"}, "choices is null; write a list"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(task, record, said, tmp_path):
    good = {"audio": "a.wav", "reference": "x", "label": "tone", "question": "?"}
    kept = (
        "audio",
        *{"sound_kind": ("label",), "transcribe": ("reference",), "ask": ("question", "reference")}[task.name],
    )
    name = lines(tmp_path / "m.jsonl", [{key: good[key] for key in kept}, record])
    with pytest.raises(ValueError, match=f"m.jsonl:2: .*{said}"):
        read_manifest([name], task=task, scratch=tmp_path)


def test_manifests_that_cannot_be_scored_as_one(tmp_path):
    record = {"audio": "a.wav", "reference": "x"}
    two = lines(tmp_path / "two.jsonl", [{**record, "language": "en"}, record, {**record, "language": "fr"}])
    with pytest.raises(ValueError, match=r"two.jsonl:3: the language is 'fr', and that of .*:1 is 'en'.*divide"):
        read_manifest([two], task=TRANSCRIBE, scratch=tmp_path)
    asked = {"audio": "a.wav", "question": "?"}
    mixed = [{**asked, "reference": "x"}, {**asked, "choices": ["x", "y"], "answer": "x"}]
    with pytest.raises(ValueError, match="some records have choices and some have none"):
        read_manifest([lines(tmp_path / "mixed.jsonl", mixed)], task=ASK, scratch=tmp_path)
    same = lines(tmp_path / "same.jsonl", [{**record, "id": 1}, {**record, "id": "1"}])
    with pytest.raises(ValueError, match=r"same.jsonl:2: the id '1' is that of .*same.jsonl:1 too; ids must differ"):
        read_manifest([same], task=TRANSCRIBE, scratch=tmp_path)
    batch = lines(tmp_path / "batch.jsonl", [record, {"audio": 3, "reference": "x"}])
    with pytest.raises(ValueError, match=r"batch.jsonl:2: the clip 3 is neither a path nor a URL"):
        read_manifest([batch], task=TRANSCRIBE, scratch=tmp_path)
    with pytest.raises(ValueError, match="holds sounds and not what is expected; name a JSONL manifest"):
        read_manifest([str(example("tone"))], task=TRANSCRIBE, scratch=tmp_path)


def test_what_a_record_expects():
    found = read_expected({"audio": "a.wav", "label": " Tone", "groups": {"room": "hall"}}, task=KIND)
    assert found == Expected(label="tone", groups={"room": "hall"})
    assert Expected.of({"expected": found.to_dict()}) == found
    choices = read_expected({"audio": "a", "question": "?", "choices": ["x", "y"], "answer": "y"}, task=ASK)
    assert Expected.of({"expected": json.loads(json.dumps(choices.to_dict()))}) == choices
    empty = read_expected({"audio": "a.wav", "reference": ""}, task=TRANSCRIBE)
    assert Expected.of({"expected": empty.to_dict()}).references == ("",)


def test_records_of_the_page_are_read(tmp_path):
    page = (Path(__file__).resolve().parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    emotion = find_task("emotion", kind="base")
    tasks = [TRANSCRIBE, find_task("translate", kind="base", language="de-en"), emotion, ASK, ASK]
    for task, line in zip(tasks, block.splitlines(), strict=True):
        (tmp_path / "m.jsonl").write_text(line)
        assert len(read_manifest([str(tmp_path / "m.jsonl")], task=task, scratch=tmp_path).expected) == 1


def test_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '\n{"audio": "a.wav", "reference": "x", "meta": {"k": 1}}\n\n\n{"audio": "b.wav", "reference": "y"}\n'
    )
    found = read_manifest([str(path)], task=TRANSCRIBE, scratch=tmp_path)
    (file,) = found.files
    written = file.path.read_text().splitlines()
    assert [bool(line) for line in written] == [False, True, False, False, True]
    assert json.loads(written[1])["meta"] == {"expected": {"references": ["x"]}, "meta": {"k": 1}}
    assert (file.name, file.root) == (str(path), str(tmp_path))


# What is done with it, by a stand-in of the model


class Parrot(EvaluationAnswerer):
    """Says what `said` has for a record's first clip; without a model."""

    said: ClassVar[dict[str, str]] = {}

    @property
    def settings(self):
        made = {
            "content": "c0ffee",
            "adapter": None,
            "dtype": "float32",
            "weights_dtype": "auto",
            "cache_dtype": "auto",
        }
        return {"model": made, "style": self._style, "said": self.said}

    def __call__(self, records):
        rows = []
        for record in records:
            name = Path(record.clips[0]).name
            row = {"id": record.id, "finish_reason": "eos", "audio_seconds": 2.0, "tokens": 3}
            if name not in self.said:
                rows.append({"id": record.id, "error": {"kind": "missing", "message": f"{name} cannot be opened"}})
                continue
            rows.append({**row, "text": self.said[name]})
            if labels := self._labels(record):
                rows[-1]["scored"] = {"label": next(iter(labels))}
        return rows


@pytest.fixture
def parrot(monkeypatch, tmp_path):
    """`parrot(**said)`: evaluations are answered so, clip by clip; the folder of the output."""
    monkeypatch.setattr(run, "EvaluationAnswerer", Parrot)

    def teach(**said: str) -> Path:
        monkeypatch.setattr(Parrot, "said", {f"{name}.wav": text for name, text in said.items()})
        return tmp_path / "out"

    return teach


def test_a_report_of_transcripts(parrot, tmp_path, capsys):
    output = parrot(a="ape bear cat dog", b="eel gnu", d="")
    records = [
        {"id": "a", "audio": "a.wav", "reference": "Ape, bear, cat, dog!", "groups": {"room": "hall"}},
        {"id": "b", "audio": "b.wav", "reference": "eel fox", "groups": {"room": "hall"}},
        {"id": "c", "audio": "c.wav", "reference": "hen ibex", "groups": {"room": "street"}, "language": "en"},
        {"id": "d", "audio": "d.wav", "reference": ""},
    ]
    command = ["evaluate", "transcribe", "--manifest", lines(tmp_path / "m.jsonl", records), "--output", str(output)]
    assert main([*command, "--published", "librispeech/test-clean"]) == 0
    said = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    first = report["scores"][0]
    assert (first["name"], first["value"]) == ("wer.qwen", pytest.approx(100 * 3 / 8))
    details = {name: first["details"][name] for name in ("insertions", "deletions", "substitutions", "tokens", "right")}
    assert details == {"insertions": 0, "deletions": 2, "substitutions": 1, "tokens": 8, "right": 2}
    assert [each["name"] for each in report["scores"]] == ["wer.qwen", "cer.qwen", "wer.open-asr", "cer.open-asr"]
    assert [each["details"]["utterances"] for each in report["scores"]] == [4, 4, 3, 3], "nothing is said in d"
    assert report["errors"] == {"missing": 1}
    assert report["groups"]["room"]["street"]["wer.qwen"] == 100
    assert report["groups"]["room"]["hall"]["records"] == 2
    (beside,) = report["published"]
    assert (beside["value"], beside["ours"], beside["same_model"]) == (1.7, first["value"], False)
    for part in ("profile:qwen", "task:transcribe.en", "model:embedded@c0ffee", "dtype:float32", "job:", "whisper-nor"):
        assert part in first["signature"]
        assert part in said
    text = (output / "report.md").read_text()
    assert "| wer.qwen | 37.50 |" in text
    assert "| librispeech/test-clean | wer.qwen | 37.50 | 1.7 | Qwen/Qwen2-Audio-7B |" in text
    assert report["rtfx"] > 0
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == ["a", "b", "c", "d"]
    assert answers[0]["meta"]["expected"]["references"] == ["Ape, bear, cat, dog!"]


def test_shards_make_the_report_when_all_are_there(parrot, tmp_path, capsys):
    output = parrot(a="This is a tone.", b="speech", c="This is noise.", d="This is noise.")
    labels = {"a": "tone", "b": "speech", "c": "noise", "d": "tone"}
    records = [{"id": name, "audio": f"{name}.wav", "label": label} for name, label in labels.items()]
    manifest = lines(tmp_path / "m.jsonl", records)
    command = ["evaluate", "sound_kind", "--manifest", manifest, "--output", str(output), "--peer-timeout", "0"]
    assert main([*command, "--shard", "0/2"]) == 3
    assert not (output / "report.json").exists()
    assert "the report is made when all shards are there" in capsys.readouterr().err
    assert main([*command, "--shard", "1/2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    scores = {each["name"]: each["value"] for each in report["scores"]}
    assert (scores["accuracy.exact"], scores["accuracy.lenient"], scores["accuracy.label-scored"]) == (50, 75, 25)
    assert (output / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    text = (output / "report.md").read_text()
    assert "![confusion matrix](confusion.png)" in text
    assert "| tone | 100.00 | 50.00 | 66.67 | 2 |" in text
    stamp = (output / "report.json").stat().st_mtime_ns
    Parrot.said.clear()
    shutil.copy(manifest, tmp_path / "elsewhere.jsonl")
    with pytest.raises(ValueError, match="belongs to another job"):
        evaluate("sound_kind", Source(name="m", files=[manifest]), output=output, running={"peer_timeout": 0})
    assert (output / "report.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("pair", ["zh-en", "en-zh", "en-de", "de-en", "es-en", "fr-en", "it-en", "ja-en", "yue-en"])
def test_every_pair_of_languages_is_scored_in_its_target(pair, parrot):
    """By sacrebleu, with its tokenizer of the target; the prompt is the base model's."""
    sacrebleu = pytest.importorskip("sacrebleu")
    target = pair.partition("-")[2]
    right = {
        "en": "It rains in the old town today.",
        "zh": "今天老城下雨了。",
        "de": "Heute regnet es in der alten Stadt.",
    }[target]
    said = {
        "en": "Today it rains in the old town.",
        "zh": "今天老城下雨。",
        "de": "Es regnet heute in der alten Stadt.",
    }[target]
    output = parrot(a=said, b=right)
    records = [{"id": name, "audio": f"{name}.wav", "language": pair, "reference": right} for name in "ab"]
    found = evaluate("translate", Source(name="m", records=records), output=output, kind="base")
    first = found.report.scores[0]
    tokenizer = "zh" if target == "zh" else "13a"
    assert first.value == sacrebleu.corpus_bleu([said, right], [[right, right]], tokenize=tokenizer).score
    for part in ("bleu|", f"tok:{tokenizer}", f"task:translate.{pair}", "kind:base"):
        assert part in first.signature
    assert f"<|{pair.partition('-')[0]}|>" in found.report.prompt


@pytest.mark.parametrize(
    ("language", "reference", "said", "name", "rate"),
    [
        ("en", "Mr. Smith's colour", "mister smith is color", "wer.qwen", 0),
        ("fr", "Où est-il ?", "où est elle", "wer.qwen", 1 / 3),
        ("de", "Ja, genau.", "ja", "wer.qwen", 1 / 2),
        ("es", "¿Qué hora es?", "que hora es", "wer.qwen", 1 / 3),
        ("it", "Perché no?", "perché no no", "wer.qwen", 1 / 2),
        ("ja", "今日は、雨。", "今日は雪", "cer.qwen", 1 / 4),
        ("yue", "我哋去飲茶。", "<|yue|>我哋去饮", "cer.qwen", 1 / 5),
        ("zh", "一共3个。", "一共三", "cer.qwen", 1 / 4),
    ],
)
def test_every_language_is_scored_by_words_or_by_characters(language, reference, said, name, rate, parrot):
    """Worked out by hand; the prompt is the base model's."""
    for package in ("opencc", "wetext") if language in ("zh", "yue") else ():
        pytest.importorskip(package)
    output = parrot(a=said)
    records = [{"id": "a", "audio": "a.wav", "language": language, "reference": reference}]
    found = evaluate("transcribe", Source(name="m", records=records), output=output, kind="base")
    first = found.report.scores[0]
    assert (first.name, first.value) == (name, pytest.approx(100 * rate))
    assert f"language:{language}|" in first.signature
    assert found.report.verified is (language in ("en", "zh", "yue", "fr"))


def test_a_data_set_is_read_as_it_was_published(parrot, tmp_path, capsys):
    """Beside the figure of its split, and the same job from wherever the data set lies."""
    parrot()
    Parrot.said["1-2-0000.flac"] = "mister smith"
    chapter = tmp_path / "one" / "LibriSpeech" / "test-other" / "1" / "2"
    chapter.mkdir(parents=True)
    (chapter / "1-2.trans.txt").write_text("1-2-0000 MISTER SMYTH\n")
    (chapter / "1-2-0000.flac").write_bytes(b"heard by nobody")
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    for place in ("one", "two"):
        command = ["evaluate", "transcribe", "--layout", "librispeech", "--data", str(tmp_path / place)]
        assert main([*command, "--split", "test-other", "--output", str(tmp_path / "out"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["data"] == "librispeech test-other"
        assert report["scores"][0]["value"] == 50
        assert [(each["name"], each["value"], each["ours"]) for each in report["published"]] == [
            ("librispeech/test-other", 4.0, 50)
        ]


AIR_BENCH = {"path": "a.wav", "question": "Which?", "answer_gt": "two", "task_name": "sound_QA", "dataset_name": "x"}


@pytest.mark.parametrize("style", ["plain", "letters"])
def test_choices_and_response_files(parrot, tmp_path, style):
    output = parrot(a="B. two", b="one")
    meta = {**AIR_BENCH, "uniq_id": 7, "choice_a": "one", "choice_b": "two"}
    asked = {"question": "Which?", "choices": ["one", "two"], "answer": "two", "meta": meta}
    records = [{"id": name, "audio": f"{name}.wav", **asked} for name in "ab"]
    found = evaluate("ask", Source(name="m", records=records), output=output, style=style)
    scores = {each.name: each.value for each in found.report.scores}
    assert scores.pop("accuracy.letters", None) == (50 if style == "letters" else None)
    assert scores == {"accuracy.words": 50, "accuracy.exact": 0, "accuracy.label-scored": 0}
    rows = [json.loads(line) for line in (output / "Foundation_result_modelx.jsonl").read_text().splitlines()]
    assert rows[0] == {**meta, "choice_c": None, "choice_d": None, "response": "B. two"}
    # What AIR-Bench's script takes from a line.
    assert (rows[0]["response"].strip()[0], rows[0]["answer_gt"] == rows[0]["choice_b"]) == ("B", True)


def test_response_files_of_chats_and_mmau():
    chat = {**AIR_BENCH, "uniq_id": 1, "meta_info": "a dog barks"}
    rows = [{"text": "Yes.", "meta": {"expected": {}, "meta": chat}}]
    ((name, content),) = response_files(rows).items()
    assert (name, json.loads(content)) == ("Chat_result_modelx.jsonl", {**chat, "response": "Yes."})
    own = {"id": "x", "question": "?", "choices": ["a", "b"], "answer": "a", "task": "sound", "difficulty": "easy"}
    rows = [{"text": "a", "meta": {"expected": {}, "meta": own}}, {"error": {}, "meta": {"expected": {}, "meta": own}}]
    ((name, content),) = response_files(rows).items()
    predictions = [{**own, "model_prediction": "a"}, {**own, "model_prediction": ""}]
    assert (name, json.loads(content)) == ("mmau_predictions.json", predictions)
    assert response_files([{"text": "a", "meta": {"expected": {}}}]) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "transcribe --output o",
            "name what to evaluate on: --manifest FILE, --layout NAME with --data DIR, or --fresh N",
        ),
        ("transcribe --manifest m.jsonl", "name where the answers and the report go: --output DIR"),
        ("transcribe --layout librispeech --output o", "--layout NAME says how the data set in --data DIR is laid out"),
        ("--manifest m.jsonl", "--manifest and --layout are for a task"),
        ("transcribe --manifest m.jsonl --output o --process-id 1", "--shard I/N instead of processes"),
        ("transcribe --fresh 2 --output gs://a/b", "fresh data is synthesised into a local folder"),
        ("transcribe --manifest m.jsonl --output o --published x/y", "no published figure of 'x/y'"),
        ("transcribe --manifest m.jsonl --output o --published meld/test", "is of the task 'emotion', and the task is"),
        ("sing --manifest m.jsonl --output o", "models of kind 'embedded' have no task 'sing'; they have transcribe"),
        ("transcribe --manifest m.jsonl --output o --language zh", "does not have 'zh'"),
        ("transcribe --manifest fr.jsonl --output o --language en", "and the records state 'fr'"),
        ("ask --manifest m.jsonl --output o --fresh 3", "name what to evaluate on"),
        ("meal --fresh 1 --output o", "fresh data has nothing for the task 'meal'"),
    ],
)
def test_command_lines_that_are_refused(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines(Path("m.jsonl"), [{"audio": "a.wav", "reference": "x"}])
    lines(Path("fr.jsonl"), [{"audio": "a.wav", "reference": "x", "language": "fr"}])
    assert main(["evaluate", *words.split()]) == 2
    assert said in capsys.readouterr().err


# The model


def test_labels_are_scored_after_the_prompt_that_was_asked(monkeypatch):
    """The request, and the texts after it, for a label, for choices by letters, and for a record's own prompt."""
    seen = []

    def score_labels(model, processor, request, labels, *, score, hearing):
        seen.append((request.prompt, request.clips, labels, score, hearing["track"]))
        return SimpleNamespace(to_dict=lambda: {"label": "x"})

    monkeypatch.setattr("qwen2audio_jax.tasks.labels.score_labels", score_labels)
    monkeypatch.setattr(TaskAnswerer, "__call__", lambda self, records: [{"id": record.id} for record in records])
    monkeypatch.setattr(EvaluationAnswerer, "_load", lambda self: (None, None))

    def scored(task, expected: Expected, **settings) -> list:
        record = Record("a", "m:1", clips=("a.wav",), meta={"expected": expected.to_dict()}, **settings)
        return EvaluationAnswerer(task=task, style="letters", label_score="length", track=1)([record])

    base = find_task("ask", kind="base", question="{question}")
    choices = Expected(question="Which?", choices=("one", "two"), answer="one")
    assert scored(KIND, Expected(label="tone")) == [{"id": "a", "scored": {"label": "x"}}]
    assert "scored" in scored(base, choices)[0]
    assert "scored" in scored(base, replace(choices, question=None), prompt="<|AUDIO|>Which?")[0]
    assert scored(TRANSCRIBE, Expected(references=("x",))) == [{"id": "a"}]
    asked = "<|audio_bos|><|AUDIO|><|audio_eos|>Choose the most suitable answer"
    assert [(prompt[: len(asked)], labels, *rest) for prompt, clips, labels, *rest in seen] == [
        (KIND.prompt, KIND.labels, "length", 1),
        (asked, {"one": "A", "two": "B"}, "length", 1),
        ("<|AUDIO|>Which?", {"one": "one", "two": "two"}, "length", 1),
    ]
    with pytest.raises(ValueError, match="label_score='best' is none of raw, length, calibrated, none"):
        EvaluationAnswerer(task=KIND, label_score="best")


@pytest.mark.slow(seconds=10)
def test_the_model_inside_is_scored_by_what_it_says_and_by_labels(tmp_path, monkeypatch):
    """Two of its examples are right by every way of reading; one label is wrong on purpose."""
    monkeypatch.setenv("QWEN2AUDIO_CACHE", str(tmp_path / "cache"))
    said = {"tone": "tone", "noise": "noise", "low-voice-58": "noise"}
    records = [{"id": name, "audio": str(example(name)), "label": label} for name, label in said.items()]
    found = evaluate("sound_kind", Source(name="examples", records=records), output=tmp_path / "out")
    assert found.state == "finished"
    scores = {each.name: each for each in found.report.scores}
    for name in ("accuracy.exact", "accuracy.lenient", "accuracy.label-scored"):
        assert scores[name].details["accuracy"]["right"] == 2
    assert scores["accuracy.exact"].details["matrix"] == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]]
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [
        max(row["scored"]["labels"], key=lambda each: row["scored"]["labels"][each]["probability"]) for row in rows
    ] == [*("tone", "noise", "speech")]
    assert re.search(
        r"prompt:[0-9a-f]{8}\|model:embedded@[0-9a-f]{16}\|dtype:float32\|job:", scores["macro_f1.exact"].signature
    )

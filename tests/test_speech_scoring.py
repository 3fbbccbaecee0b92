"""Scores by hand-made cases, and an evaluation of a random model as a user types it."""

import json

import pytest
from hf_layout import random_tensors, write_tensors

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.speech import espeak
from qwen2audio_jax.speech.dataset import write_dataset
from qwen2audio_jax.speech.evaluate import evaluate, read_records
from qwen2audio_jax.speech.model_files import write_model_files
from qwen2audio_jax.speech.scoring import Answer, digit_error_rate, edit_distance, score, task_of
from qwen2audio_jax.speech.tasks import PAIR, TRANSCRIBE


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("4719", "4719", 0), ("4719", "479", 1), ("4719", "47019", 1), ("4719", "4819", 1), ("123", "", 3)]
    + [("", "12", 2), ("1234", "2341", 2), ("kitten", "sitting", 3), ("13579", "02468", 5)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_digit_error_rate_is_over_all_digits():
    answers = [
        Answer("transcribe", "4 7 1 9", "4 7 9"),
        Answer("transcribe", "3", "3 3 5"),
        Answer("transcribe", "", "8"),
        Answer("transcribe", "1 2 3 4 5", "1 2 3 4 5"),
    ]
    assert digit_error_rate(answers) == (1 + 2 + 1 + 0) / 10
    assert digit_error_rate([Answer("transcribe", "", "")]) is None


def test_scores():
    scores = score(
        [
            Answer("transcribe", "4 7", "4 7 "),
            Answer("transcribe", "4 7", "47"),
            Answer("transcribe", "", ""),
            Answer("say", "The digits are 1 2.", "The digits are 1 3."),
            Answer("sum", "2 plus 3 is 5.", "2 plus 3 is 5."),
            Answer("sum", "2 plus 3 is 5.", "2 plus 2 is 5."),
            Answer("count", "Two digits are spoken.", "Two digits are spoken."),
            Answer("voice", "The voice is low.", "The voice is high."),
            Answer("kind", "This is noise.", "This is noise."),
            Answer("pair: tone", "The first clip.", "The first clip."),
        ]
    )
    assert scores.digit_error_rate == 0 and scores.strings_right == 2 / 3
    assert scores.chat_digit_error_rate == 0.5
    assert scores.sums == 0.5 and scores.analysis == 2 / 3 and scores.pairs == 1
    assert scores.overall == 0.6 and scores.examples == 10
    assert scores.accuracy["voice"] == 0 and scores.counts["transcribe"] == 3
    empty = score([])
    assert empty.overall is empty.sums is empty.digit_error_rate is None


def test_names_of_tasks():
    chat = [
        {"role": "user", "content": [{"type": "text", "text": PAIR["more"]}]},
        {"role": "assistant", "content": "x"},
    ]
    assert task_of({"task": "pair", "messages": chat}) == "pair: more"
    assert task_of({"task": "sum"}) == "sum"
    with pytest.raises(ValueError, match="task is 'song'"):
        task_of({"task": "song"})


def test_bad_records(tmp_path):
    with pytest.raises(ValueError, match=r"records\.jsonl is missing"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(ValueError, match="no records"):
        read_records(tmp_path)
    for line in ('{"task": "transcribe"', "[]", '{"task": "transcribe", "prompt": "x", "response": "1"}'):
        (tmp_path / "records.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"records\.jsonl:1: this is no record"):
            read_records(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The embedded model's files with random weights."""
    folder = write_model_files(tmp_path_factory.mktemp("model") / "model")
    write_tensors(folder, random_tensors(json.loads((folder / "config.json").read_text()), seed=3))
    return folder


def test_evaluate_answers_as_single_questions(model, tmp_path):
    """Batches of records give each record the answer that it gets alone, in the records' order."""
    try:
        write_dataset(tmp_path / "data", clips=9, seed=4, split="test", workers=1)
    except ValueError as error:
        pytest.skip(str(error))
    processor = Qwen2AudioProcessor.from_pretrained(model)
    network = Qwen2AudioForConditionalGeneration.from_pretrained(model, dtype="float32", cache_dir=tmp_path / "cache")
    steps = []
    answers = evaluate(network, processor, data=tmp_path / "data", batch=4, progress=lambda *done: steps.append(done))
    records = read_records(tmp_path / "data")
    assert steps[-1] == (9, 9)
    checked = 0
    for record, answer in zip(records, answers, strict=True):
        assert answer.task == task_of(record)
        if record["task"] == "transcribe" and checked < 2:
            clip = str(tmp_path / "data" / record["audios"][0])
            inputs = processor(text=TRANSCRIBE, audio=clip)
            ids = network.generate(**inputs, max_new_tokens=32)[:, inputs.input_ids.shape[1] :]
            assert answer.said == processor.batch_decode(ids, skip_special_tokens=True)[0]
            assert answer.expected == record["digits"]
            checked += 1
    assert checked
    with pytest.raises(ValueError, match="batch is 0"):
        evaluate(network, processor, data=tmp_path / "data", batch=0)


def test_command(model, tmp_path, capsys):
    try:
        espeak.version()
    except ValueError as error:
        pytest.skip(str(error))
    options = ["--model", str(model), "--cache-dir", str(tmp_path), "--dtype", "float32"]
    assert main(["evaluate", *options, "--fresh", "4", "--seed", "3", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["examples"] == 4 == sum(scores["counts"].values())
    assert main(["evaluate", *options, "--fresh", "2"]) == 0
    assert "all right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --data DIR or --fresh N"),
        (["--data", "x", "--fresh", "3"], "either --data DIR or --fresh N"),
        (["--data", "x", "--seed", "3"], "--seed and --split are for --fresh"),
        (["--data", "/nowhere"], "records.jsonl is missing"),
        (["--fresh", "0"], "clips=0"),
    ],
)
def test_bad_options(arguments, said, capsys):
    assert main(["evaluate", "--model", "/none", *arguments]) == 2
    assert said in capsys.readouterr().err

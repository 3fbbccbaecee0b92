"""Records of ms-swift, LLaMA-Factory and TRL are those of this package's own form, and other orders and losses."""

import json

import numpy as np
import pytest
from records import make_processor

from qwen2audio_jax.cli.main import main
from qwen2audio_jax.train.encoding import ExampleEncoder
from qwen2audio_jax.train.records import read_record


def turns(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def read(record, *, preferences=False):
    line = json.dumps(record).encode()
    return read_record(line, where="x.jsonl:1", audio_root="/clips", preferences=preferences)


ASKED = turns("<audio>What is it?", "A dog.")
SINGLE = {
    "swift": {"query": "<audio>What is it?", "response": "A dog.", "audios": ["a.wav"]},
    "swift with nothing before": {"system": "", "query": "<audio>What is it?", "response": "A dog.", "history": []},
    "swift messages": {"messages": ASKED, "audios": ["a.wav"], "rejected_response": None},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<audio>What is it?"}, {"from": "gpt", "value": "A dog."}]
    },
    "sharegpt with roles": {
        "conversations": [{"from": "user", "value": "<audio>What is it?"}, {"from": "assistant", "value": "A dog."}],
        "system": "",
    },
    "sharegpt with roles and contents": {"conversations": ASKED},
    "with what a table notes besides": {
        **{"query": "<audio>What is it?", "response": "A dog.", "dataset": "aishell", "duration": 2.5, "idx": 7},
        **{"speaker": "S0764", "split": "train", "images": [], "videos": [], "tools": "", "objects": {}},
    },
    "alpaca": {"instruction": "<audio>What is it?", "input": "", "output": "A dog."},
    "alpaca with everything": {
        **{"instruction": "<audio>What is it?", "input": "", "output": "A dog.", "system": "", "history": []},
    },
    "trl": {"prompt": ASKED[:1], "completion": ASKED[1:]},
    "trl with a text": {"prompt": ASKED[:1], "completion": "A dog."},
}


@pytest.mark.parametrize("form", SINGLE)
def test_one_question(form):
    assert read({**SINGLE[form], "audios": ["a.wav"]}) == read({"messages": ASKED, "audios": ["a.wav"]})


LONG = turns("<audio>one", "1", "two", "2", system="Count.")
SEVERAL = {
    "swift": {"system": "Count.", "history": [["<audio>one", "1"]], "query": "two", "response": "2"},
    "sharegpt": {
        "system": "Count.",
        "conversations": [
            {"from": "human", "value": "<audio>one"},
            {"from": "gpt", "value": "1"},
            {"from": "human", "value": "two"},
            {"from": "gpt", "value": "2"},
        ],
    },
    "sharegpt, system inside": {
        "conversations": [
            {"from": "system", "value": "Count."},
            {"from": "human", "value": "<audio>one"},
            {"from": "gpt", "value": "1"},
            {"from": "human", "value": "two"},
            {"from": "gpt", "value": "2"},
        ]
    },
    "alpaca": {"system": "Count.", "history": [["<audio>one", "1"]], "instruction": "two", "output": "2"},
    "trl": {"prompt": LONG[:-1], "completion": LONG[-1:]},
}


@pytest.mark.parametrize("form", SEVERAL)
def test_several_turns(form):
    assert read({**SEVERAL[form], "audios": ["a.wav"]}) == read({"messages": LONG, "audios": ["a.wav"]})


def test_an_input_is_the_next_line_of_an_instruction():
    record = {"instruction": "Translate.", "input": "<audio>", "output": "Ein Hund.", "audios": ["a.wav"]}
    assert read(record) == read({"messages": turns("Translate.\n<audio>", "Ein Hund."), "audios": ["a.wav"]})


def test_a_completion_of_a_text_is_a_response():
    raw = {"prompt": "<|audio_bos|><|AUDIO|><|audio_eos|>Say:", "audios": ["a.wav"]}
    assert read({**raw, "completion": "4 7"}) == read({**raw, "response": "4 7"})


ANSWERS = {"chosen": "A dog.", "rejected": "No idea."}
BOTH = {key: [{"role": "assistant", "content": text}] for key, text in ANSWERS.items()}
PAIRS = {
    "swift": {"query": "<audio>What is it?", "response": "A dog.", "rejected_response": "No idea."},
    "swift messages": {"messages": ASKED, "rejected_response": "No idea."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<audio>What is it?"}],
        "chosen": {"from": "gpt", "value": "A dog."},
        "rejected": {"from": "gpt", "value": "No idea."},
    },
    "swift, whole conversations": {"messages": ASKED, "rejected_messages": [*ASKED[:1], *BOTH["rejected"]]},
    "sharegpt with roles and contents": {
        "conversations": ASKED[:1],
        "chosen": BOTH["chosen"][0],
        "rejected": BOTH["rejected"][0],
    },
    "alpaca": {"instruction": "<audio>What is it?", **ANSWERS},
    "trl": {"prompt": ASKED[:1], **BOTH},
    "trl without a prompt": {key: [*ASKED[:1], *answer] for key, answer in BOTH.items()},
    "messages and lists": {"messages": ASKED[:1], **BOTH},
}


@pytest.mark.parametrize("form", PAIRS)
def test_pairs(form):
    found = read({**PAIRS[form], "audios": ["a.wav"]}, preferences=True)
    assert found == read({"messages": ASKED[:1], **ANSWERS, "audios": ["a.wav"]}, preferences=True)
    assert found.answers == ("A dog.", "No idea.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, r"conversations\[0\] is .*Calls of tools"),
        ({"conversations": {}}, "conversations is {}; it must be a list of turns"),
        ({"query": "a", "response": "b", "history": [["a"]]}, "must be pairs of question and answer"),
        ({"query": ["a"], "response": "b"}, r'query is \["a"\]; it must be text'),
        ({"query": "a"}, "without the assistant's answer there is nothing to learn"),
        ({"query": "a", "response": "b", "images": ["x.png"]}, "unknown key 'images'"),
        ({"query": "a", "response": "b", "audois": ["x.wav"]}, "unknown key 'audois'"),
        ({"query": "a", "response": "b", "label": True}, "unknown key 'label'"),
        ({"query": "a", "response": "b", "audio_path": "x.wav"}, "unknown key 'audio_path'"),
        ({"messages": ASKED, "rejected_messages": turns("other", "x")}, "the messages with another answer"),
        ({"messages": ASKED, "rejected_messages": []}, "the messages with another answer"),
        ({"rejected_response": "b", "query": "a"}, "rejected_response goes with a response"),
        ({"prompt": ASKED[:1], "chosen": BOTH["chosen"] * 2, "rejected": "b"}, "chosen must be one answer"),
        ({"chosen": ASKED, "rejected": turns("other", "x")}, "rejected must be one answer, behind the same messages"),
    ],
)
def test_what_is_none_of_these_forms(record, message):
    with pytest.raises(ValueError, match=rf"^x.jsonl:1: .*{message}"):
        read(record, preferences=any(key.startswith("rejected") for key in record))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return ExampleEncoder(make_processor(tmp_path_factory.mktemp("processor")))


def learnt(encoder, messages):
    (segment,) = encoder.encode(read({"messages": messages}))
    return encoder._tokenizer.decode(segment.ids[segment.learnt])


def test_a_message_out_of_the_loss(encoder):
    """LLaMA-Factory and ms-swift write `loss`, OpenAI `weight`; on other messages they say what is so anyway."""
    whole = turns("one", "1", "two", "2")
    assert learnt(encoder, whole) == "1<|im_end|>2<|im_end|>"
    for key, off, on in (("loss", False, True), ("weight", 0, 1), ("loss", 0.0, 1.0)):
        messages = [dict(message) for message in whole]
        messages[0][key], messages[1][key], messages[3][key] = off, off, on
        assert learnt(encoder, messages) == "2<|im_end|>"
        plain, masked = (encoder.encode(read({"messages": each}))[0] for each in (whole, messages))
        np.testing.assert_array_equal(plain.ids, masked.ids)


@pytest.mark.parametrize("value", [2, "no", -1, [0]])
def test_a_loss_that_is_neither(value):
    messages = turns("one", "1")
    messages[1]["loss"] = value
    with pytest.raises(ValueError, match=r"messages\[1\]: loss is .*; it must be true or false, or 1 or 0"):
        read({"messages": messages})


def test_no_answer_in_the_loss():
    messages = [{**message, "loss": False} for message in turns("one", "1")]
    with pytest.raises(ValueError, match="no answer is in the loss"):
        read({"messages": messages})


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uua", "2<|im_end|>"),
        ("uaa", "1<|im_end|>2<|im_end|>"),
        ("suuaua", "3<|im_end|>5<|im_end|>"),
        ("saua", "1<|im_end|>3<|im_end|>"),
    ],
)
def test_turns_in_any_order(encoder, roles, expected):
    names = {"u": "user", "a": "assistant", "s": "system"}
    assert learnt(encoder, [{"role": names[r], "content": str(i)} for i, r in enumerate(roles)]) == expected


def test_a_byte_order_mark_and_the_line_ends_of_windows():
    line = "\ufeff" + json.dumps({"messages": turns("a", "b")}) + "\r\n"
    plain = read({"messages": turns("a", "b")})
    assert read_record(line.encode(), where="x.jsonl:1", audio_root="/clips", preferences=False) == plain


def converted(folder, content):
    (folder / "theirs.json").write_text(content, encoding="utf-8")
    code = main(["train", "--convert-records", str(folder / "theirs.json"), str(folder / "ours.jsonl")])
    return code, (folder / "ours.jsonl").read_text().splitlines() if code == 0 else None


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([*SINGLE.values()][1:5], indent=2),
        "\ufeff" + json.dumps([*SINGLE.values()][1:5]),
        "".join(json.dumps(record) + "\r\n" for record in [*SINGLE.values()][1:5]),
    ],
    ids=["array", "array with a byte order mark", "lines"],
)
def test_files_are_converted_to_our_form(tmp_path, content, capsys):
    content = content.replace(', "audios": ["a.wav"]', "").replace("<audio>", "")
    code, lines = converted(tmp_path, content)
    assert code == 0
    assert capsys.readouterr().err == f"{tmp_path / 'ours.jsonl'}: 4 records\n"
    asked = [{**message, "content": message["content"].replace("<audio>", "")} for message in ASKED]
    assert {json.dumps(json.loads(line)["messages"]) for line in lines} == {json.dumps(asked)}


def test_pairs_are_converted_too(tmp_path):
    code, (line,) = converted(tmp_path, json.dumps([{**PAIRS["trl"], "audios": ["a.wav"]}]))
    assert (code, json.loads(line)) == (0, {"messages": ASKED[:1], **ANSWERS, "audios": ["a.wav"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"query": "a", "response": "b"}, {"query": "a"}]', r"theirs.json[1]: the messages end with"),
        ('{"query": "a", "response": "b"}\n{"query": 3}', r"theirs.json:2: query is 3; it must be text"),
        ("[3]", "theirs.json[0]: 3 is no record"),
        ("[{", "theirs.json: no JSON at character"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(tmp_path, content, message, capsys):
    assert converted(tmp_path, content)[0] == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.json"]


def test_a_file_that_is_there_is_not_written_over(tmp_path, capsys):
    (tmp_path / "ours.jsonl").write_text("mine")
    assert converted(tmp_path, "[]")[0] == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "name a training configuration" in capsys.readouterr().err
    assert main(["train", "run.toml", "--convert-records", "a", "b"]) == 2
    assert "leave out the configuration" in capsys.readouterr().err

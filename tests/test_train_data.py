"""Training data from records: accepted and refused forms, error messages, and loss masks."""

import json
import os

import numpy as np
import pytest
import sounds
import tiny
from records import CONFIG, RAW, chat, make_processor, open_records, unpack, write_clip, write_records

from qwen2audio_jax.audio import log_mel
from qwen2audio_jax.train import index as index_module
from qwen2audio_jax.train.dataset import open_dataset
from qwen2audio_jax.train.encoding import ExampleEncoder
from qwen2audio_jax.train.records import read_record
from qwen2audio_jax.train.settings import DataSettings

# Samples of each clip: 31, 50, 100 and 161 frames.
CLIPS = {"a.wav": 4960, "b.wav": 8000, "c.wav": 16_000, "d.wav": 25_700}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture
def folder(tmp_path):
    for seed, (name, samples) in enumerate(CLIPS.items()):
        write_clip(tmp_path / name, samples, seed=seed)
    return tmp_path


def samples_of(folder, name):
    from qwen2audio_jax.audio import load_audio

    return load_audio(folder / name)


def sequences(dataset, **options):
    """Every sequence of an evaluation pass by the ids of its records; one record a row."""
    return {ids[0]: (batch, unpack(batch, 0)) for batch, ids in dataset.batches(**options)}


MULTI_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A bell."},
    {"role": "user", "content": [{"type": "audio", "audio": "c.wav"}, {"type": "audio", "audio": "b.wav"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Two "}, {"type": "text", "text": "dogs, 你好"}]},
]


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        (chat("What is it?", "a dog"), ["a dog"]),
        (chat("<audio>How many?", "3", "b.wav"), ["3"]),
        (chat("How many?", "3", "b.wav", "a.wav"), ["3"]),
        (chat("First <audio>, then <audio>: which?", "the second\n", "b.wav", "a.wav"), ["the second\n"]),
        (chat("Say <|im_end|> please", "<|im_end|> is <|AUDIO|>"), ["<|im_end|> is <|AUDIO|>"]),
        ({"messages": MULTI_TURN}, ["A bell.", "Two dogs, 你好"]),
    ],
    ids=["text", "marker", "no marker", "two clips", "control text", "turns"],
)
def test_ids_are_the_processors_and_labels_the_answers(folder, processor, record, answers):
    dataset = open_records(folder, [record], processor=processor, rows=1, packing=False, split="evaluate")
    ((batch, ids),) = dataset.batches()
    (found,) = unpack(batch, 0)
    assert ids == [f"{folder / 'records.jsonl'}:1"]
    messages = json.loads(json.dumps(record["messages"]))
    audios = record.get("audios", [])
    if audios:  # the same conversation in the processor's own form
        text = messages[0]["content"] if "<audio>" in messages[0]["content"] else "<audio>" * len(audios) + "How many?"
        items = []
        for i, part in enumerate(text.split("<audio>")):
            items += [{"type": "audio", "audio": str(folder / audios[i - 1])}] if i else []
            items += [{"type": "text", "text": part}] if part else []
        messages[0]["content"] = items
    for message in messages:
        for item in message["content"] if isinstance(message["content"], list) else []:
            if item["type"] == "audio":
                item["audio"] = str(folder / item["audio"])
    expected = processor.apply_chat_template(messages, tokenize=True)
    assert np.array_equal(found["ids"], expected.input_ids[0])
    # Runs of labels: each is one answer and its end.
    learnt = found["targets"] != -100
    assert np.array_equal(found["targets"][learnt], found["ids"][1:][learnt[:-1]])
    runs = np.split(np.flatnonzero(learnt), np.flatnonzero(np.diff(np.flatnonzero(learnt)) > 1) + 1)
    texts = [found["targets"][run].tolist() for run in runs]
    assert all(text[-1] == tiny.IM_END for text in texts)
    assert [processor.decode(text[:-1]) for text in texts] == answers
    # The clips, in order, and where their vectors go.
    clips = int((batch.frames > 0).sum())
    width = batch.features.shape[-1] // 4
    if clips:
        count = expected.feature_attention_mask.sum(1)
        assert batch.frames[0, :clips].tolist() == count.tolist()
        for i in range(clips):
            length = batch.features.shape[-1]
            assert np.array_equal(batch.features[0, i], expected.input_features[i, :, :length])
        slots = found["slots"][found["slots"] >= 0]
        tokens = [((n - 1) // 2 + 1 - 2) // 2 + 1 for n in count]
        assert slots.tolist() == [i * width + k for i, n in enumerate(tokens) for k in range(n)]
    assert np.array_equal(found["slots"] >= 0, found["ids"] == tiny.AUDIO)


def test_raw_prompts_end_with_the_end_of_text(folder, processor):
    records = [
        {"prompt": f"{RAW}Recognize: <|en|>", "response": "4 7 1", "audios": ["a.wav"], "id": 17},
        {"prompt": f"{RAW}Recognize: <|en|>", "response": "", "audios": ["b.wav"], "id": "silence"},
    ]
    found = sequences(open_records(folder, records, processor=processor, rows=1, packing=False, split="evaluate"))
    assert list(found) == ["17", "silence"]
    for record, name in zip(records, found, strict=True):
        (sequence,) = found[name][1]
        inputs = processor(text=record["prompt"], audio=samples_of(folder, record["audios"][0]))
        prompt = inputs.input_ids[0]
        answer = [*processor.tokenizer.encode(record["response"]), tiny.END_OF_TEXT]
        assert sequence["ids"].tolist() == [*prompt, *answer]
        assert sequence["targets"].tolist() == [-100] * (len(prompt) - 1) + answer + [-100]


def test_two_records_in_a_row_by_hand(folder, processor):
    records = [
        {"prompt": f"{RAW}ab", "response": "cd", "audios": ["a.wav"]},
        {"prompt": "e", "response": "f"},
        {"prompt": f"{RAW}g{RAW}", "response": "h", "audios": ["b.wav", "a.wav"]},
    ]
    dataset = open_records(folder, records, processor=processor, rows=1, max_tokens=64, split="evaluate", frames=(60,))
    ((batch, ids),) = dataset.batches()
    letter = {c: processor.tokenizer.encode(c)[0] for c in "abcdefgh"}
    bos, eos, end, audio = tiny.AUDIO_BOS, tiny.AUDIO_EOS, tiny.END_OF_TEXT, tiny.AUDIO
    # 31 frames give 8 vectors and 50 give 12. Rows are packed from the longest example on.
    parts = [
        ([bos, *[audio] * 12, eos, letter["g"], bos, *[audio] * 8, eos, letter["h"], end], 2),
        ([bos, *[audio] * 8, eos, letter["a"], letter["b"], letter["c"], letter["d"], end], 3),
        ([letter["e"], letter["f"], end], 2),
    ]
    row = [id for part, _ in parts for id in part]
    lengths = [len(part) for part, _ in parts]
    rest = 64 - sum(lengths)
    assert ids == [f"{folder / 'records.jsonl'}:{line}" for line in (3, 1, 2)]
    assert batch.ids[0].tolist() == row + [0] * rest
    assert (
        batch.segments[0].tolist()
        == [s for s, n in zip((1, 2, 3), lengths, strict=True) for _ in range(n)] + [0] * rest
    )
    assert batch.positions[0].tolist() == [i for n in lengths for i in range(n)] + [0] * rest
    targets = []
    for part, learnt in parts:
        targets += [-100] * (len(part) - 1 - learnt) + part[-learnt:] + [-100]
    assert batch.targets[0].tolist() == targets + [-100] * rest
    slots = [-1, *range(12), -1, -1, -1, *range(15, 23), -1, -1, -1]  # W = 60 // 4
    slots += [-1, *range(30, 38), -1, -1, -1, -1, -1, -1]
    assert batch.slots[0].tolist() == slots + [-1] * (64 - len(slots))
    assert batch.frames.tolist() == [[50, 31, 31, 0]]
    assert batch.features.shape == (1, 4, 128, 60)
    for slot, name in enumerate(("b.wav", "a.wav", "a.wav")):
        assert np.array_equal(batch.features[0, slot], log_mel(samples_of(folder, name), max_frames=60)[0])
    assert not batch.features[0, 3].any()
    assert all(array.dtype == np.int32 for array in (batch.ids, batch.targets, batch.segments, batch.slots))


def test_pairs_share_their_clips(folder, processor):
    question = [{"role": "user", "content": "<audio>What is it?"}]
    records = [
        {"messages": question, "audios": ["b.wav"], "chosen": "a dog", "rejected": "no idea", "id": "chat"},
        {"prompt": f"{RAW}say", "audios": ["a.wav"], "chosen": "one", "rejected": "two", "id": "raw"},
    ]
    dataset = open_records(
        folder, records, processor=processor, rows=1, max_tokens=256, preferences=True, split="evaluate"
    )
    ((batch, ids),) = dataset.batches()
    assert ids == ["chat", "raw"]
    found = unpack(batch, 0)
    answers = [processor.decode(s["targets"][s["targets"] != -100]) for s in found]
    assert answers == ["a dog<|im_end|>", "no idea<|im_end|>", "one<|endoftext|>", "two<|endoftext|>"]
    assert batch.frames[0].tolist() == [50, 31, 0, 0]
    for chosen, rejected in (found[:2], found[2:]):
        heard = [s["slots"][s["slots"] >= 0].tolist() for s in (chosen, rejected)]
        assert heard[0] == heard[1] != []
        prompt = int((chosen["targets"] != -100).argmax())
        assert np.array_equal(chosen["ids"][: prompt + 1], rejected["ids"][: prompt + 1])


@pytest.mark.parametrize(
    ("question", "answer", "audios", "heard", "learnt"),
    [
        (r"What is \<audio> in HTML?", "An element.", [], ["What is <audio> in HTML?"], "An element."),
        ("How do I embed sound?", "Use <audio>.", [], ["How do I embed sound?"], "Use <audio>."),
        ("How do I embed sound?", r"Use \<audio>.", [], ["How do I embed sound?"], "Use <audio>."),
        (r"<audio>What of the \<audio> tag?", "It <audio>.", ["a"], [None, "What of the <audio> tag?"], "It <audio>."),
        (r"What of the \<audio> tag?", "It exists.", ["a"], [None, "What of the <audio> tag?"], "It exists."),
        (r"\<audio><audio>\<audio>", "Both.", ["a"], ["<audio>", None, "<audio>"], "Both."),
        (r"<audio>\<audio><audio>", "Both.", ["a", "b"], [None, "<audio>", None], "Both."),
        ([{"type": "text", "text": "<audio>"}], "A tag.", [], ["<audio>"], "A tag."),
        ([{"type": "text", "text": r"\<audio>"}], "Escaped.", [], [r"\<audio>"], "Escaped."),
    ],
)
def test_the_word_itself(question, answer, audios, heard, learnt):
    """Text about HTML: `None` stands where a clip is heard."""
    line = json.dumps(chat(question, answer, *audios)).encode()
    record = read_record(line, where="a:1", audio_root="/", preferences=False)
    first, last = (message["content"] for message in record.chat.messages)
    assert [item.get("text") for item in first] == heard if isinstance(first, list) else [first] == heard
    assert last == learnt
    assert record.clips == tuple(f"/{name}" for name in audios)


BAD = {
    "no JSON": (b'{"messages": [', "no JSON at character"),
    "bytes": (b'{"prompt": "\xff"}', "is no UTF-8"),
    "a list": ([1], "is no record"),
    "unknown key": (chat("a", "b", audio="a.wav"), "unknown key 'audio'"),
    "both forms": ({**chat("a", "b"), "prompt": "a"}, "either messages or a prompt"),
    "neither form": ({"audios": ["a.wav"]}, "either messages or a prompt"),
    "messages": ({"messages": {}}, "must be a list of messages"),
    "no messages": ({"messages": []}, "not empty"),
    "a message": ({"messages": ["hello"]}, r"messages\[0\] is"),
    "message key": ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "unknown key 'name'"),
    "no role": ({"messages": [{"content": "a"}]}, r"messages\[0\] has no role"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
    "content": ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]}, "is int"),
    "role": ({"messages": [{"role": "human", "content": "a"}]}, 'role "human"'),
    "two users": ({"messages": [{"role": "user", "content": "a"}] * 2}, r'the messages end with "user"'),
    "late system": ({"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "c"}]}, '"system"'),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, 'end with "user"'),
    "empty answer": (chat("a", ""), "empty answer"),
    "answer of no items": (chat("a", []), "empty answer"),
    "clip in the answer": (
        chat("<audio>a", "<audio>", "a.wav", "b.wav"),
        "1 places that wait for a clip .*, but 2 audios",
    ),
    "clip item in the answer": (chat("a", [{"type": "audio", "audio": "a.wav"}]), "an answer with a clip"),
    "marker without a clip": (
        chat("<audio>a", "b"),
        r"1 places .*, but 0 audios; the word itself is written \"\\\\<audio>\" in JSON",
    ),
    "too many markers": (chat("<audio><audio>", "b", "a.wav"), "2 places that wait for a clip .*, but 1 audios"),
    "too few markers": (chat("<audio>", "b", "a.wav", "b.wav"), "1 places that wait for a clip .*, but 2 audios"),
    "raw placeholders": ({"prompt": RAW, "response": "a"}, "0 clips, but 1 <|AUDIO|> placeholders"),
    "raw clips": ({"prompt": "a", "response": "a", "audios": ["a.wav"]}, "1 clips, but 0 <|AUDIO|> placeholders"),
    "raw answer": ({"prompt": "a", "response": RAW, "audios": ["a.wav"]}, "the answer holds <|AUDIO|>"),
    "no response": ({"prompt": "a"}, "no response"),
    "response": ({"prompt": "a", "response": 3}, "response is 3"),
    "empty prompt": ({"prompt": "", "response": "a"}, 'prompt is ""'),
    "messages and response": ({**chat("a", "b"), "response": "c"}, "response belongs to prompt"),
    "a pair": ({**chat("a", "b"), "chosen": "c", "rejected": "d"}, 'objective.kind = "dpo"'),
    "audios": (chat("a", "b") | {"audios": "a.wav"}, "must be a list of paths"),
    "a clip": (chat("a", "b") | {"audios": [3]}, "the clip 3 is no path"),
    "an address": (chat("a", "b", "https://example.com/a.wav"), "is an address; download it"),
    "id": (chat("a", "b", id=[1]), "id is"),
    "missing clip": (chat("a", "b", "none.wav"), "cannot read '.*none.wav': No such file"),
    "no sound": (chat("a", "b", "records.jsonl"), "/records.jsonl': "),
    "short clip": (chat("a", "b", "short.wav"), "short.wav': .* 320 samples"),
    "broken clip": (chat("a", "b", "broken.wav"), "broken.wav'"),
    "newline before the answer": (chat("a", "\nb"), r"messages\[1\]: the tokens before or of this answer"),
    "tokens": (chat("a" * 200, "b"), r"\d+ tokens; data.max_tokens allows 160"),
    "clips": (chat("a", "b", *["a.wav"] * 5), "5 clips; data.max_clips allows 4"),
    "frames": (chat("a", "b", "d.wav"), "161 frames in its longest clip; data.frames allows 118"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named_by_file_and_line(folder, processor, name):
    bad, message = BAD[name]
    write_clip(folder / "short.wav", 320)
    (folder / "broken.wav").write_bytes((folder / "c.wav").read_bytes()[:9000])
    lines = [
        json.dumps(chat("a", "b", id="good")).encode(),
        b"",
        bad if isinstance(bad, bytes) else json.dumps(bad).encode(),
    ]
    path = folder / "records.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    settings = dict(train=(str(path),), rows=4, max_tokens=160, max_clips=4, frames=(60, 120))
    options = dict(processor=processor, config=CONFIG, seed=0, cache_dir=folder / "cache")
    with pytest.raises(ValueError, match=rf"(?s)^1 bad record; .*records.jsonl:3: .*{message}"):
        open_dataset(DataSettings(**settings), **options)
    dataset = open_dataset(DataSettings(**settings, on_bad_record="skip"), **options)
    assert len(dataset) == 1
    assert len(dataset.skipped) == 1
    assert dataset.skipped[0].startswith(f"{path}:3: ")
    ((_, ids),) = dataset.batches(stop=1)
    assert ids == ["good"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("a", "b"), "needs chosen and rejected"),
        ({"prompt": "a", "chosen": "b"}, "needs chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "response": "d"}, "and no response"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same text"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "needs chosen and rejected"),
        ({**chat("a", "b"), "chosen": "b", "rejected": "c"}, 'end with "assistant"'),
    ],
)
def test_bad_pairs(record, message):
    with pytest.raises(ValueError, match=rf"^x.jsonl:4: .*{message}"):
        read_record(json.dumps(record).encode(), where="x.jsonl:4", audio_root="", preferences=True)


def test_many_bad_records_are_counted(folder, processor):
    with pytest.raises(ValueError, match=r"(?s)^8 bad records.*jsonl:1: .*jsonl:5: .*\n\.\.\. and 3 more$"):
        open_records(folder, [{}] * 8, processor=processor)
    with pytest.raises(ValueError, match="no record that can be used"):
        open_records(folder, [{}] * 8, processor=processor, on_bad_record="skip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "data.train names no file"),
        ({"train": ("nowhere.jsonl",)}, "cannot read the records nowhere.jsonl: No such file"),
        ({"max_tokens": 4096}, "max_tokens = 4096, but the model has 2048 positions"),
    ],
)
def test_settings_that_do_not_fit(folder, processor, change, message):
    path = write_records(folder / "records.jsonl", [chat("a", "b")])
    settings = DataSettings(**({"train": (str(path),)} | change))
    with pytest.raises(ValueError, match=message):
        open_dataset(settings, processor=processor, config=CONFIG, seed=0, cache_dir=folder)


def test_a_template_that_hides_the_answer_is_refused(tmp_path):
    lines = {
        # The last turn is written otherwise than earlier ones.
        "tokens before or of this answer": "{{ m.role }}{% if loop.last and not add_generation_prompt %}!{% endif %}",
        "writes 0 control tokens": "{{ m.role }}:{{ m.content }}\n",
        "writes 2 control tokens": "{% if m.role == 'user' %}u{% else %}<|im_end|>{{ m.content }}<|im_end|>{% endif %}",
    }
    for i, (message, line) in enumerate(lines.items()):
        template = "{% for m in messages %}" + line + "{% endfor %}"
        encoder = ExampleEncoder(make_processor(tmp_path / str(i), chat_template=template))
        messages = [*chat("a", "b")["messages"], *chat("a", "b")["messages"]]
        line = json.dumps({"messages": messages}).encode()
        record = read_record(line, where="x.jsonl:1", audio_root="", preferences=False)
        with pytest.raises(ValueError, match=rf"^x.jsonl:1: messages\[1\].*{message}"):
            encoder.encode(record)


def test_relative_clips_start_at_the_file_or_the_root(folder, processor):
    (folder / "sub").mkdir()
    write_clip(folder / "sub" / "e.wav", 5000)
    path = write_records(folder / "sub" / "records.jsonl", [chat("a", "b", "e.wav")])
    options = dict(processor=processor, config=CONFIG, seed=0, cache_dir=folder / "cache")
    assert len(open_dataset(DataSettings(train=(str(path),)), **options)) == 1
    with pytest.raises(ValueError, match=r"cannot read '.*e.wav'"):
        open_dataset(DataSettings(train=(str(path),), audio_root=str(folder)), **options)
    other = write_records(folder / "sub" / "others.jsonl", [chat("a", "b", "a.wav")])
    assert len(open_dataset(DataSettings(train=(str(other),), audio_root=str(folder)), **options)) == 1


def test_the_index_is_kept_until_something_changes(folder, processor, monkeypatch):
    records = [chat("a", "b", "a.wav", id="x"), chat("a", "c", "a.wav", "b.wav"), {}]
    options = dict(processor=processor, on_bad_record="skip")
    looked = []
    look = index_module._look
    monkeypatch.setattr(index_module, "_look", lambda paths: looked.append(len(paths)) or look(paths))
    first = open_records(folder, records, **options)
    again = open_records(folder, records, **options)
    assert looked == [2]  # each clip once, and nothing the second time
    assert (again.sha256, again.skipped) == (first.sha256, first.skipped)
    for (one, ids), (other, names) in zip(first.batches(stop=2), again.batches(stop=2), strict=True):
        assert ids == names
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))
    # Other sound, other hash; and the same hash in another place.
    before = (folder / "b.wav").stat()
    write_clip(folder / "b.wav", 8000, seed=9)
    os.utime(folder / "b.wav", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = open_records(folder, records, **options)
    assert looked == [2, 2]
    assert changed.sha256 != first.sha256
    assert open_records(folder, [*records, chat("d", "e")], **options).sha256 != changed.sha256
    # What is no index is made anew.
    for kept in (folder / "cache").glob("*.npz"):
        kept.write_bytes(b"PK\x03\x04 nothing")
    assert open_records(folder, records, **options).sha256 == changed.sha256
    assert not list((folder / "cache").glob(".*.incomplete"))


def test_the_hash_does_not_depend_on_the_place(tmp_path, processor):
    hashes = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_clip(tmp_path / name / "a.wav", 6000)
        hashes.add(open_records(tmp_path / name, [chat("a", "b", "a.wav")], processor=processor).sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("content", [b"gone", None, "longer"])
def test_a_clip_that_changes_during_the_run_is_named(folder, processor, content):
    dataset = open_records(folder, [chat("a", "b", "a.wav")], processor=processor)
    if content is None:
        (folder / "a.wav").unlink()
    elif content == "longer":
        write_clip(folder / "a.wav", 9000)
    else:
        (folder / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"records.jsonl:1: .*a\.wav"):
        list(dataset.batches(stop=1))


def test_other_formats_and_rates_are_clips_too(tmp_path, processor):
    (tmp_path / "a.flac").write_bytes(sounds.encode("flac", sounds.speech(22_050, rate=22_050), 22_050))
    ((batch, _),) = open_records(tmp_path, [chat("a", "b", "a.flac")], processor=processor).batches(stop=1)
    assert batch.frames.max() == 100

"""`qwen2audio batch` as a user types it, with the embedded model: its texts, named errors, and refusals."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import batch_clips
import numpy as np
import pytest
import sounds

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import example, examples
from qwen2audio_jax.engine.slots import Slots

ROOT = Path(__file__).resolve().parent.parent

QUESTION = "Which digits are spoken?"
RAW = "<|audio_bos|><|AUDIO|><|audio_eos|>Detect the language and recognize the speech: <|en|>"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2AUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(cache):
    return Qwen2AudioForConditionalGeneration.from_pretrained()


@pytest.fixture(scope="module")
def processor():
    return Qwen2AudioProcessor.from_pretrained()


def refusal(capsys, *arguments) -> str:
    code = main([str(argument) for argument in ("batch", *arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    return err.splitlines()[-1]


def alone(record: dict, *, model, processor) -> str:
    """The text by the calls that the README shows, for this record by itself."""
    clips = record["audio"] if isinstance(record["audio"], list) else [record["audio"]]
    if "<|AUDIO|>" in record.get("prompt", ""):
        inputs = processor(text=record["prompt"], audio=clips)
    else:
        content = [{"type": "audio", "audio": clip} for clip in clips]
        content += [{"type": "text", "text": record["prompt"]}] if "prompt" in record else []
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    ids = model.generate(**inputs, **record.get("options", {}))
    return processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_good_records_get_the_text_of_generate_and_bad_files_named_errors(tmp_path, capsys, model, processor):
    good = [
        {"id": "digits", "audio": str(example("digits-4719")), "prompt": QUESTION},
        {
            "id": "cut short",
            "audio": str(example("high-voice-306")),
            "prompt": QUESTION,
            "options": {"max_new_tokens": 4},
        },
        {"id": "raw", "audio": str(example("low-voice-58")), "prompt": RAW},
        {"id": "two", "audio": [str(example("tone")), str(example("low-voice-58"))], "prompt": "Which one is a tone?"},
        {"id": "voice chat", "audio": str(example("sum-two-plus-three"))},
    ]
    whole = sounds.encode("wav", sounds.speech(16_000), 16_000)
    flac = sounds.encode("flac", sounds.speech(16_000), 16_000)
    files = {
        "corrupt": (flac[:400] + bytes(400) + flac[800:], "corrupt"),
        "empty": (b"", "empty"),
        "not a number": (sounds.encode("wavfloat", np.full(16_000, np.nan, np.float32), 16_000), "not_finite"),
        "wrong type": (b"%PDF-1.7 no sound here" * 9, "format"),
        "cut": (whole[: len(whole) // 2], "truncated"),
        "long": (sounds.encode("wav", np.full(31 * 16_000, 0.01, np.float32), 16_000), "too_long"),
        "missing": (None, "missing"),
    }
    bad = []
    for name, (content, _) in files.items():
        bad.append({"id": name, "audio": f"{name}.wav"})
        if content is not None:
            (tmp_path / f"{name}.wav").write_bytes(content)
    bad.append({"id": "options", "audio": str(example("tone")), "options": {"temperatur": 1}})
    bad.append({"id": "places", "audio": str(example("tone")), "prompt": RAW * 2})
    bad.append({"id": "budget", "audio": str(example("tone")), "options": {"max_new_tokens": 9000}})
    mixed = sorted([*good, *bad], key=lambda record: record["id"])
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    command = ["batch", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "out"), "--token-ids"]
    assert main([*command, "--merge", str(tmp_path / "all.jsonl")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["state"], summary["errors"]) == ("finished", len(bad))
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())}
    assert len(rows) == len(good) + len(bad)
    for record in good:
        row = rows[record["id"]]
        assert row["text"] == alone(record, model=model, processor=processor), row
        assert row["tokens"] == len(row["token_ids"])
    assert rows["digits"]["text"] == "The digits are 4 7 1 9."
    assert rows["cut short"]["suspect"] == ["cut"]
    assert rows["digits"]["audio_seconds"] == pytest.approx(2.52)
    for name, (_, kind) in files.items():
        assert rows[name]["error"]["kind"] == kind, rows[name]
        assert "0x" not in rows[name]["error"]["message"]
    for name, words in (("options", "'temperatur'"), ("places", "placeholders"), ("budget", "9000")):
        assert rows[name]["error"]["kind"] == "input", rows[name]
        assert words in rows[name]["error"]["message"]
    # Other settings are another job.
    assert "options.max_new_tokens is 3 and was null" in refusal(capsys, *command[1:], "--max-new-tokens", 3)


def test_cut_files_are_heard_if_wanted_and_marked(tmp_path, capsys, cache):
    whole = sounds.encode("wav", sounds.speech(16_000), 16_000)
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.wav").write_bytes(whole)
    command = ["batch", str(tmp_path), "--prompt", QUESTION, "--max-new-tokens", "2", "--output", str(tmp_path / "out")]
    assert main([*command, "--allow-truncated", "--merge", str(tmp_path / "all.jsonl")]) == 0
    capsys.readouterr()
    cut, intact = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert cut["truncated_audio"] is True
    assert cut["audio_seconds"] == pytest.approx(0.5, abs=0.01)
    assert "truncated_audio" not in intact
    # What was heard in part belongs to another job than what was refused.
    assert "allow_truncated" in refusal(capsys, *command[1:])


@pytest.mark.slow(seconds=12)
def test_draws_do_not_depend_on_the_group(cache, model):
    options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 6}
    records = [Record(f"r{i}", "", prompt="Hello", seed=100 + i) for i in range(4)]
    together = Answerer(options=options, slots=4)(records)
    again = [row for record in records[::-1] for row in Answerer(options=options, slots=1)([record])][::-1]
    assert [row["text"] for row in together] == [row["text"] for row in again]
    assert len({row["text"] for row in together}) > 1


def test_a_failing_device_costs_the_record_that_fails(cache, monkeypatch):
    original = Slots.first_tokens
    calls = []

    def first_tokens(self, logits, embedded, rows):
        calls.append([row.seed for row in rows])
        if 2 in calls[-1] or len(calls) > 40:
            raise RuntimeError("RESOURCE_EXHAUSTED at 0x7f0011223344")
        return original(self, logits, embedded, rows)

    monkeypatch.setattr(Slots, "first_tokens", first_tokens)
    answerer = Answerer(options={"max_new_tokens": 2}, slots=4)
    records = [Record(f"r{i}", "", prompt="Hello", seed=i) for i in range(4)]
    for _ in range(2):
        rows = answerer(records)
        assert ["error" in row for row in rows] == [False, False, True, False]
        assert rows[2]["error"] == {"kind": "device", "message": "the model's device failed (RuntimeError)"}
    # Nor does it cost those of another call that runs at the same time.
    calls.clear()
    others = [Record(f"o{i}", "", prompt="Good day", seed=100 + i) for i in range(6)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(answerer, (records, others)))
    assert ["error" in row for row in both[0] + both[1]] == [False, False, True, *[False] * 7]
    calls += [[]] * 40
    with pytest.raises(RuntimeError, match=r"the model fails on every record: .*RESOURCE_EXHAUSTED"):
        answerer(records)
    answerer.close()


@pytest.mark.slow(seconds=65)
def test_two_hosts_by_the_command_of_which_one_is_killed(tmp_path, capsys, cache):
    """The embedded model in two processes on one folder; what the killed one leaves is done by the other."""
    lines = [
        {"id": f"{path.stem} {i}", "audio": str(path), "prompt": QUESTION} for i in range(20) for path in examples()
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["batch", str(tmp_path / "m.jsonl"), "--slots", "4", "--quiet", "--output"]
    script = "import sys; from qwen2audio_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    hosts = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", script, *command, str(tmp_path / "out")),
                *("--shard", f"{i}/2", "--merge", str(tmp_path / f"{i}.jsonl")),
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    while not list((tmp_path / "out").glob("part-*")):
        assert hosts[1].poll() is None
        time.sleep(0.05)
    hosts[1].kill()
    assert hosts[1].wait() != 0
    assert hosts[0].wait(timeout=300) == 0
    assert main([*command, str(tmp_path / "alone"), "--merge", str(tmp_path / "alone.jsonl")]) == 0
    texts = [
        [(row["id"], row["text"]) for row in map(json.loads, (tmp_path / name).read_text().splitlines())]
        for name in ("0.jsonl", "alone.jsonl")
    ]
    assert texts[0] == texts[1]
    assert [id for id, _ in texts[0]] == [line["id"] for line in lines]


def test_bad_input_is_one_line(tmp_path, capsys):
    manifest, output = tmp_path / "m.jsonl", ("--output", tmp_path / "out")
    assert "there is no such file or folder" in refusal(capsys, manifest, *output)
    manifest.write_text('{"id": "a", "audio": "a.wav"}')
    assert "of three: 0/3" in refusal(capsys, manifest, *output, "--shard", "3/3")
    assert "no such folder" in refusal(capsys, manifest, *output, "--model", tmp_path / "none")
    assert "cannot be read (No such file" in refusal(capsys, manifest, *output, "--suspect", tmp_path / "none")
    for option in ("--slots", "--workers", "--positions"):
        assert f"{option} -1: at least" in refusal(capsys, manifest, *output, option, -1)
    assert "--mesh" in refusal(capsys, manifest, *output, "--mesh", "2by4")
    assert "local file" in refusal(capsys, manifest, *output, "--merge", "gs://mine/all.jsonl")
    assert "needs --mesh" in refusal(capsys, manifest, *output, "--mesh-across-hosts")
    assert "give one of them" in refusal(capsys, manifest, *output, "--mesh-across-hosts", "--mesh", "2x1", "--ray")
    assert "for --mesh-across-hosts" in refusal(capsys, manifest, *output, "--num-processes", 2)
    manifest.write_text('{"id": "a", "audioo": "a.wav"}')
    assert "no record can be used" in refusal(capsys, manifest, *output)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_no_model(tmp_path, capsys):
    code = main(["batch", str(example("tone").parent), "--output", str(tmp_path / "out"), "--dry-run"])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["state"], found["left"], found["problems"]) == (0, "dry_run", 6, [])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_hears_as_the_job_would_and_says_what_plan_expects(tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    whole = sounds.encode("wav", sounds.speech(64_000), 16_000)
    (clips / "a.wav").write_bytes(whole)
    (clips / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (clips / "long.wav").write_bytes(sounds.encode("wav", np.full(31 * 16_000, 0.01, np.float32), 16_000))
    (clips / "two.mp4").write_bytes(sounds.encode_av("mp4", "aac", sounds.speech(24_000), 24_000, tracks=2))

    def dry(*options: str) -> dict:
        assert main(["batch", str(clips), "--output", str(tmp_path / "out"), "--dry-run", *options]) == 0
        return json.loads(capsys.readouterr().out)

    found = dry()
    assert {problem["id"]: problem["kind"] for problem in found["problems"]} == {
        "cut.wav": "truncated",
        "long.wav": "too_long",
        "two.mp4": "format",
    }
    assert found["heard_in_part"] == 0
    found = dry("--allow-truncated", "--truncation", "--track", "1", "--max-new-tokens", "40")
    # Only one file has a second track.
    assert [problem["kind"] for problem in found["problems"]] == ["format"] * 3
    found = dry("--allow-truncated", "--truncation", "--track", "0", "--max-new-tokens", "40")
    assert (found["problems"], found["heard_in_part"], found["longest_seconds"]) == ([], 1, 30.0)
    words = shlex.split(found["plan"])
    assert words[:2] == ["qwen2audio", "plan"]
    words[words.index("--topology") + 1] = "h100x8"
    assert main([*words[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"]["clips"] == 4


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize(
    "how",
    [
        *("one", "4x2", "8x1", "hosts", "across-2x1", "across-1x2"),
        *(pytest.param(how, marks=pytest.mark.long_job) for how in ("one-killed", "hosts-killed")),
    ],
)
def test_clips_of_all_kinds_through_a_job(how, tmp_path, cache):
    [figures] = batch_clips.run(tmp_path, clips=50, jobs=(how,), longest=8.0)
    assert (figures["good"], figures["bad"]) == (47, 3)


@pytest.mark.slow(seconds=20)
def test_the_page_on_batch_jobs_runs_as_it_stands(tmp_path, cache, capsys, monkeypatch):
    """Its Python: a job, and the engine by itself."""
    monkeypatch.chdir(tmp_path)
    line = {"id": "a", "audio": str(example("tone")), "prompt": QUESTION}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line))
    page = (ROOT / "docs" / "batch.md").read_text()
    job, engine = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(job, "batch.md", "exec"), {})
    assert capsys.readouterr().out == "finished 1\n"
    exec(compile(engine, "batch.md", "exec"), {})
    assert capsys.readouterr().out.endswith(" 1\n")  # one clip for two questions

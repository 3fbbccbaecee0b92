"""Several processes with rows of their own give what one process gives: tokens, logits, audio features, errors."""

import json

import numpy as np
import pytest
import tiny
from hf_layout import write_hf_checkpoint
from judge import relative_error
from processes import ROOT, finish, free_port, start
from shares_process import BUDGETS, OPTIONS, PARTS, of_rows

from qwen2audio_jax.convert import convert
from qwen2audio_jax.embedded import example
from qwen2audio_jax.parallel.process_rows import Share, agree, global_rows, share_of
from qwen2audio_jax.parallel.sharding import make_mesh
from qwen2audio_jax.speech.tasks import TRANSCRIBE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    write_hf_checkpoint(folder / "hf", "gqa", layers=1, seed=tiny.SEEDS["gqa"])
    convert(folder / "hf", folder / "orbax")
    return folder / "orbax"


@pytest.fixture(scope="module")
def one(checkpoint):
    from qwen2audio_jax import Qwen2AudioForConditionalGeneration

    return Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint)


def together(folder, checkpoint, *, processes, devices, data, model, groups, full, copies):
    address = f"127.0.0.1:{free_port()}"
    share = processes // groups
    started = []
    for number in range(processes):
        group = number // share
        case = {"process": number, "processes": processes, "data": data, "model": model, "group": group}
        case |= {"rows": PARTS[groups][group], "checkpoint": str(checkpoint), "seed": 10 * group, "full": full}
        case["copies"] = copies
        started.append(start(ROOT / "tests" / "shares_process.py", json.dumps(case), address, folder, devices=devices))
    for code, _, err in finish(started, timeout=500):
        assert code == 0, err
    return [dict(np.load(folder / f"{number}.npz")) for number in range(processes)]


@pytest.mark.parametrize(
    ("processes", "devices", "data", "model", "groups"),
    [
        pytest.param(2, 2, 2, 2, 2, id="two-processes-a-model-group-each", marks=pytest.mark.slow(seconds=30)),
        pytest.param(4, 1, 4, 1, 4, id="four-processes-of-one-device", marks=pytest.mark.slow(seconds=30)),
        pytest.param(
            *(4, 1, 2, 2, 2), id="four-processes-of-which-two-share-a-model-group", marks=pytest.mark.slow(seconds=40)
        ),
        pytest.param(2, 1, 2, 1, 2, id="two-processes-of-one-device"),
    ],
)
def test_processes_give_what_one_gives(checkpoint, one, tmp_path, processes, devices, data, model, groups):
    """Rows, clips, lengths and budgets differ between the processes."""
    full = groups < processes or processes == 2
    copies = processes // groups % 2 + 1  # another shape: of these, where it is compiled fewer times
    sizes = {"devices": devices, "data": data, "model": model, "groups": groups}
    results = together(tmp_path, checkpoint, processes=processes, full=full, copies=copies, **sizes)
    for number, result in enumerate(results):
        group = number * groups // processes
        inputs = of_rows(PARTS[groups][group])
        labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
        called = one(**inputs, labels=labels)
        assert relative_error(result["logits"], called.logits) < 1e-5
        assert relative_error(result["loss"], called.loss) < 1e-5
        tokens = one.generate(**inputs, **OPTIONS, max_new_tokens=BUDGETS[group])
        np.testing.assert_array_equal(result["tokens"], tokens)
        if full:
            sampled = {"do_sample": True, "temperature": 1.2, "num_return_sequences": copies, "max_new_tokens": 6}
            expected = one.generate(**inputs, **{**OPTIONS, **sampled}, seed=10 * group)
            np.testing.assert_array_equal(result["sampled"], expected)
            heard = inputs if "input_features" in inputs else of_rows((1,))
            features = one.encode_audio(heard["input_features"], heard["feature_attention_mask"])
            np.testing.assert_array_equal(result["lengths"], features.lengths)
            for clip, length in enumerate(result["lengths"]):
                kept = np.asarray(features.projected)[clip, :length]
                assert relative_error(result["projected"][clip, :length], kept) < 1e-5
        said = json.loads(str(result["said"]))
        assert ("vocabulary has ids 0 to 320" if number == 1 else "process 1 refused its inputs") in said["wrong"]
        assert "given different options" in said["options"]
        assert "stream runs in one process" in said["stream"]
        if groups == processes:
            assert said["rows"] == "done"
        else:
            first = group * (processes // groups)
            assert f"processes {first}, {first + 1} share a model group" in said["rows"]


@pytest.mark.slow(seconds=25)
def test_commands_in_two_processes(tmp_path):
    """The first one alone tells the answers; of an evaluation each asks its share."""
    from qwen2audio_jax.embedded import EMBEDDED
    from qwen2audio_jax.source import resolve_checkpoint

    resolve_checkpoint(EMBEDDED, cache_dir=tmp_path / "cache")
    record = {
        "task": "transcribe",
        "prompt": TRANSCRIBE,
        "response": "306",
        "audios": [str(example("high-voice-306"))],
        "meta": {"clips": [{"seconds": 2.0}]},
    }
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(record) for _ in range(3)))
    generate = ["generate", "--audio", "example:high-voice-306", "Which digits are spoken?", "--mesh", "1x2"]
    evaluation = ["evaluate", "--data", tmp_path, "--batch", "2", "--json", "--mesh", "2x1"]
    for command in (generate, evaluation):
        where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
        both = [
            start("-m", "qwen2audio_jax", *command, *where, number, QWEN2AUDIO_CACHE=str(tmp_path / "cache"))
            for number in range(2)
        ]
        results = finish(both)
        assert [code for code, *_ in results] == [0, 0], results
        # Gloo has a word to say on stdout.
        told = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for _, out, _ in results]
        assert told[1] == []
        if command is generate:
            assert told[0] == ["The digits are 3 0 6."]
        else:
            scores = json.loads(told[0][0])
            assert (scores["counts"], scores["digit_error_rate"]) == ({"transcribe": 3}, 0.0)


def fake_mesh(owners):
    """A mesh's shape and the processes of its devices, without devices."""
    import types

    devices = np.empty(np.shape(owners), object)
    for place, owner in np.ndenumerate(np.asarray(owners)):
        devices[place] = types.SimpleNamespace(process_index=owner)
    return types.SimpleNamespace(devices=devices, shape=dict(zip(("data", "model"), devices.shape, strict=True)))


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ([[0, 0], [0, 0], [1, 1], [1, 1]], Share(2, 1, (2, 3), False)),
        ([[0], [1], [0], [1]], Share(2, 1, (1, 3), False)),
        ([[0, 1], [2, 3]], Share(2, 0, (0,), False)),
        ([[0, 1, 2, 3]], Share(1, 0, (0,), False)),
        ([[1, 1]], Share(1, 0, (0,), True)),
        ([[0, 1], [1, 2]], "unequal or overlapping"),
        ([[0], [1], [1]], "unequal or overlapping"),
        ([[0], [2]], "none of the mesh's devices belongs to this process"),
    ],
)
def test_shares_of_a_mesh(monkeypatch, owners, expected):
    monkeypatch.setattr("jax.process_count", lambda: 4)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    find = share_of.__wrapped__
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            find(fake_mesh(owners))
    else:
        assert find(fake_mesh(owners)) == expected


def test_rows_among_those_of_all(monkeypatch):
    monkeypatch.setattr("qwen2audio_jax.parallel.process_rows.share_of", lambda mesh: Share(2, 1, (1, 3), False))
    assert global_rows(None, np.arange(4), size=4).tolist() == [2, 3, 6, 7]


def test_one_process_agrees_with_itself():
    mesh = make_mesh(data=4, model=2)
    assert share_of(mesh) == Share(1, 0, (0, 1, 2, 3), True)
    with pytest.raises(ZeroDivisionError):
        agree(mesh, lambda: 1 / 0)

"""Batch jobs on Ray: whatever dies, every record has one row in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="jobs on Ray need the extra `ray`")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from batch_process import Echo

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.run import run_batch
from qwen2audio_jax.embedded import examples
from qwen2audio_jax.ray import ATTEMPTS, Cluster, answer

pytestmark = [
    pytest.mark.slow(seconds=18, together="ray"),
    # Ray starts its processes by a fork that runs another program at once.
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning"),
]
TESTS = str(Path(__file__).resolve().parent)


class Deadly(Echo):
    """Ends its process at some records: at "once" until it has left a mark, at "always" each time."""

    def __init__(self, marks: Path):
        super().__init__()
        self.marks = marks

    def __call__(self, records):
        for record in records:
            mark = self.marks / record.id
            if record.prompt == "always" or (record.prompt == "once" and not mark.exists()):
                with mark.open("a") as file:
                    file.write("died\n")
                os._exit(1)
        return super().__call__(records)


@pytest.fixture(scope="module")
def cluster():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, str(Path(TESTS).parent), before]))
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield Cluster(actors=2)
    ray.shutdown()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


def write(path: Path, prompts) -> str:
    lines = ({"id": f"r{index}", "prompt": prompt} for index, prompt in enumerate(prompts))
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_shard_whose_actor_dies_is_answered_by_another(cluster, tmp_path):
    prompts = ["hear"] * 60
    prompts[7] = prompts[33] = "once"
    prompts[50] = "always"
    manifest = write(tmp_path / "m.jsonl", prompts)
    summary = run_batch(
        [manifest],
        output=tmp_path / "out",
        answerer=Deadly(tmp_path),
        cluster=cluster,
        merge=tmp_path / "all.jsonl",
        quiet=True,
    )
    assert summary.state == "finished"
    found = rows(tmp_path / "all.jsonl")
    assert [row["id"] for row in found] == [f"r{index}" for index in range(60)]
    lost = [row for row in found if "error" in row]
    assert {row["error"]["kind"] for row in lost} == {"lost"}
    assert "r50" in {row["id"] for row in lost}
    assert len(lost) <= 3  # of one shard
    assert (tmp_path / "r50").read_text().count("died") == ATTEMPTS
    assert summary.figures["errors"] == len(lost)
    alone = run_batch(
        [manifest], output=tmp_path / "alone", answerer=Echo(), merge=tmp_path / "alone.jsonl", quiet=True
    )
    assert alone.state == "finished"
    texts = {row["id"]: row["text"].rpartition(" ")[0] for row in rows(tmp_path / "alone.jsonl")}
    assert all(row["text"].rpartition(" ")[0] == texts[row["id"]] for row in found if "text" in row)


def test_an_error_of_the_job_ends_it(cluster, tmp_path):
    class Broken(Echo):
        def __call__(self, records):
            raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        run_batch(
            [write(tmp_path / "m.jsonl", ["hear"])],
            output=tmp_path / "out",
            answerer=Broken(),
            cluster=cluster,
            quiet=True,
        )


def test_a_killed_driver_goes_on(tmp_path):
    manifest = write(tmp_path / "m.jsonl", ["hear"] * 300)
    script = """
import sys, json
from batch_process import Echo
from qwen2audio_jax.batch.run import run_batch
from qwen2audio_jax.ray import Cluster
manifest, output, merge = sys.argv[1:]
cluster = Cluster(actors=2)
print("started", flush=True)
summary = run_batch([manifest], output=output, answerer=Echo(delay=0.02), cluster=cluster, merge=merge, quiet=True)
print(summary.state, summary.figures["records"])
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS}{os.pathsep}{Path(TESTS).parent}"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", script, manifest, str(tmp_path / "out"), str(tmp_path / "all.jsonl")]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while len(list((tmp_path / "out").glob("part-*"))) < 5:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    state, answered = second.stdout.splitlines()[-1].split()
    assert (state, second.returncode) == ("finished", 0), second.stderr[-2000:]
    assert 0 < int(answered) < 300
    assert Counter(row["id"] for row in rows(tmp_path / "all.jsonl")) == Counter(f"r{i}" for i in range(300))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own
def test_the_embedded_model_answers_as_generate(cluster, tmp_path):
    paths = [str(path) for path in examples()]
    lines = [{"id": f"r{index}", "audio": path, "prompt": "What is said?"} for index, path in enumerate(paths)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answerer = Answerer(options={"max_new_tokens": 8}, slots=2)
    summary = run_batch(
        [str(tmp_path / "m.jsonl")],
        output=tmp_path / "out",
        answerer=answerer,
        cluster=cluster,
        merge=tmp_path / "all.jsonl",
        quiet=True,
    )
    assert summary.state == "finished"
    model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(), Qwen2AudioProcessor.from_pretrained()
    expected = []
    for path in paths:
        content = [{"type": "audio", "audio": path}, {"type": "text", "text": "What is said?"}]
        chat = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        ids = model.generate(**inputs, max_new_tokens=8)[0, inputs.input_ids.shape[1] :]
        expected.append(processor.decode(ids, skip_special_tokens=True))
    assert [row["text"] for row in rows(tmp_path / "all.jsonl")] == expected
    data = ray.data.from_items(
        [{"audio": path, "name": f"r{index}"} for index, path in enumerate([*paths[:3], "/no.wav"])]
    )
    answered = answer(data, answerer=answerer, prompt="What is said?", id="name").take_all()
    found = {row["name"]: row for row in answered}
    assert [found[f"r{index}"]["text"] for index in range(3)] == expected[:3]
    assert "cannot be opened" in found["r3"]["error"]

"""The examples of clusters: read by what they are for, as far as that is here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2audio_jax.embedded import example

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def test_the_slurm_script_runs_as_one_task_of_an_array(tmp_path):
    """With a stand-in for srun, and for the model's command one that shows what it was called with."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, line in (("srun", 'exec "$@"'), ("qwen2audio", 'echo "$SLURM_ARRAY_TASK_ID: $*"')):
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    command = ["bash", str(EXAMPLES / "slurm.sbatch")]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "the folder of the model" in refused.stderr
    environment |= {"MODEL": "m", "MANIFEST": "in.jsonl", "OUTPUT": "out"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "3: batch in.jsonl --model m --output out --workers 4\n"


@pytest.mark.parametrize("name", ["jobset.yaml", "skypilot.yaml"])
def test_yaml_names_options_that_there_are(name):
    yaml = pytest.importorskip("yaml")
    from qwen2audio_jax.cli.main import build_parser

    content = yaml.safe_load((EXAMPLES / name).read_text())
    if name == "skypilot.yaml":
        words = content["run"].split()
    else:
        pod = content["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        words = [*container["command"], *container["args"]]
        count = content["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"]
        assert container["env"] == [{"name": "JOB_COMPLETIONS", "value": str(count)}]
    assert words[0] == "qwen2audio"
    options = build_parser().parse_args(words[1:])
    assert (options.command, options.inputs) == ("batch", ["gs://mine/manifest.jsonl"])


def test_the_compose_file_starts_the_server_that_it_asks():
    yaml = pytest.importorskip("yaml")
    from qwen2audio_jax.cli.main import build_parser

    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]
    model, chat = services["model"], services["chat"]["environment"]
    options = build_parser().parse_args(model["command"])
    assert (options.command, options.host, options.no_auth) == ("serve", "0.0.0.0", True)
    assert "ports" not in model  # it has no key, so nobody outside reaches it
    assert chat["AUDIO_STT_MODEL"] == options.name
    assert {chat["OPENAI_API_BASE_URL"], chat["AUDIO_STT_OPENAI_API_BASE_URL"]} == {f"http://model:{options.port}/v1"}
    assert (EXAMPLES / model["build"]["context"] / model["build"]["dockerfile"]).is_file()


@pytest.mark.slow(seconds=60)
def test_the_beam_pipeline(tmp_path):
    """In this environment, or in the one whose Python is $BEAM_PYTHON."""
    python = os.environ.get("BEAM_PYTHON")
    if python is None:
        pytest.importorskip("apache_beam", reason="Beam is not here: name the Python of an environment in $BEAM_PYTHON")
        python = sys.executable
    lines = [
        {"id": "digits", "audio": str(example("digits-4719")), "prompt": "Which digits are spoken?"},
        {"id": "none", "audio": "/no/such.wav", "prompt": "?"},
        {"id": "odd", "audioo": "a.wav"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [python, str(EXAMPLES / "dataflow.py"), str(tmp_path / "m.jsonl"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("BEAM_PATH", "")])}
    done = subprocess.run(
        [*command, "--runner", "DirectRunner"],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {}
    for path in tmp_path.glob("out-*.jsonl"):
        rows |= {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert rows["digits"]["text"] == "The digits are 4 7 1 9."
    assert rows["none"]["error"]["kind"] == "missing"
    assert "unknown key 'audioo'" in rows["odd"]["error"]["message"]

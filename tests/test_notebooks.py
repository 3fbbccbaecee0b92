"""The notebooks: as committed they have been run, and they run again from the first cell to the last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("first_steps", "fine_tune_lora")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_a_whole_run(name):
    text = (EXAMPLES / f"{name}.ipynb").read_text()
    assert not [folder for folder in ("/tmp/", "/home/", "/root/", "/work/") if folder in text]
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {
        kind for cell in code for output in cell["outputs"] for kind in (output["output_type"], *output.get("data", ()))
    }
    assert "image/png" in kinds
    assert "error" not in kinds
    first = "".join(text for output in code[0]["outputs"] for text in output["text"])
    for word in ("HBM", "RAM", "disk", "fits: "):
        assert word in first


@pytest.mark.slow(seconds=50)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path):
    pytest.importorskip("nbmake", reason="the extra notebooks is not installed")
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=600", "-q", "-c", os.devnull]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "QWEN2AUDIO_CACHE": str(tmp_path), "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(EXAMPLES / f"{name}.ipynb")],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

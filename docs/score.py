"""The score of docs/quality.md: runs what a machine can check of the twenty points.

    python docs/score.py [--only N ...] [--quick] [--json]

A point has several checks: all hold is 2, at least half of them 1, fewer 0. What a person has to look at is a check
that the person has written down here, with what was seen.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Check = Callable[[], str | None]
"""Returns None if it holds, else what is missing."""


@dataclass(frozen=True)
class Point:
    """A point: its name, its checks, and whether they take more than ten seconds."""

    name: str
    checks: Sequence[tuple[str, Check]]
    long: bool = False


def run(command: str, *, says: str | None = None, code: int = 0) -> str | None:
    """A command of this environment: its exit code, and a pattern in what it prints."""
    words = shlex.split(command)
    if words[0] in ("pytest", "mkdocs", "mypy"):
        words = [sys.executable, "-m", *words]
    elif words[0] == "qwen2audio":
        words = [sys.executable, "-m", "qwen2audio_jax", *words[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if done.returncode != code:
        return f"{command}: exit code {done.returncode}: {printed.strip()[-200:]}"
    return None if says is None or re.search(says, printed, re.MULTILINE) else f"{command}: does not print {says!r}"


def tests(names: str) -> tuple[str, Check]:
    """Tests that pass; one that was skipped is not enough."""
    return f"pytest {names}", partial(run, f"pytest -q -n0 -p no:cacheprovider {names}", says=r"\d+ passed")


def prints(command: str, pattern: str, *, code: int = 0) -> tuple[str, Check]:
    """A command that prints a pattern."""
    return command, partial(run, command, says=pattern, code=code)


def files(*names: str) -> tuple[str, Check]:
    """Files that are there."""

    def check() -> str | None:
        missing = [name for name in names if not any(path.is_file() for path in ROOT.glob(name))]
        return f"missing: {', '.join(missing)}" if missing else None

    return f"{len(names)} files are there", check


def holds(page: str, *patterns: str) -> tuple[str, Check]:
    """Patterns in a file."""

    def check() -> str | None:
        text = (ROOT / page).read_text(encoding="utf-8")
        missing = [pattern for pattern in patterns if not re.search(pattern, text)]
        return f"{page}: lacks {', '.join(missing)}" if missing else None

    return f"{page} says it", check


def seen(what: str, *, so: bool = True) -> tuple[str, Check]:
    """What a person looked at."""
    return f"by hand: {what}", lambda: None if so else what


def seconds(command: Sequence[str]) -> float:
    """The median time of five runs after one."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def quick_start() -> str | None:
    """Import and --version, on a machine that is idle."""
    python = sys.executable
    bare = seconds([python, "-c", "pass"])
    found = {
        "import over bare": (seconds([python, "-c", "import qwen2audio_jax"]) - bare, 0.6),
        "--version": (seconds([python, "-m", "qwen2audio_jax", "--version"]), 0.5),
        "--help": (seconds([python, "-m", "qwen2audio_jax", "--help"]), 0.5),
        "an argument error": (seconds([python, "-m", "qwen2audio_jax", "--no"]), 0.5),
    }
    slow = [f"{name} {took:.2f} s" for name, (took, limit) in found.items() if took > limit]
    return ", ".join(slow) or None


def dated_numbers() -> str | None:
    """Every section of the performance page with numbers has a command, hardware or compiler, and a date."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    bad = []
    for section in page.split("\n## ")[1:]:
        need = {
            "command": r"`(python|qwen2audio) ",
            "date": r"20\d\d-\d\d-\d\d|jax 0\.",
            "hardware": r"cores|v5e|hardware",
        }
        bad += [
            f"{section.splitlines()[0]}: no {name}" for name, pattern in need.items() if not re.search(pattern, section)
        ]
    return "; ".join(bad) or None


def one_version() -> str | None:
    """The version is the same everywhere."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    places = {
        "qwen2audio_jax/_version.py": f'"{version}"',
        "CITATION.cff": f"version: {version}\n",
        "CHANGELOG.md": f"## {version}",
    }
    bad = [name for name, text in places.items() if text not in (ROOT / name).read_text(encoding="utf-8")]
    return f"{version} is not in {', '.join(bad)}" if bad else None


def notebook_outputs() -> str | None:
    """The notebooks have been run: outputs, plots, no error."""
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        text = json.dumps([cell["outputs"] for cell in cells])
        if any(cell["execution_count"] is None for cell in cells) or '"error"' in text or "image/png" not in text:
            return f"{path.name}: not run, failed, or without a plot"
    return None


ANSWER = 'qwen2audio generate --audio example:digits-4719 "Which digits are spoken?"'
COMMANDS = ("generate", "chat", "batch", "serve", "train", "evaluate", "plan", "models", "doctor", "convert")

POINTS = {
    1: Point(
        "First answer",
        [
            prints(ANSWER, r"The digits are 4 7 1 9\."),
            tests("tests/test_readme.py"),
            seen("README's first command in a fresh clone and environment"),
        ],
        long=True,
    ),
    2: Point(
        "Hugging Face folder",
        [
            tests("tests/test_cli.py::test_hugging_face_folder_as_typed tests/test_source.py::test_hub_id"),
            tests("tests/test_export.py::test_every_tensor_gets_its_bytes_back"),
        ],
        long=True,
    ),
    3: Point("Pasted snippets", [tests("tests/test_snippets.py")], long=True),
    4: Point(
        "Bad inputs",
        [
            tests("tests/test_cli.py -k bad"),
            tests("tests/test_docs.py -k message"),
            prints("qwen2audio generate --audio nofile.wav x", r"^.*nofile\.wav.*check the path\s*$", code=2),
        ],
        long=True,
    ),
    5: Point(
        "Help and JSON",
        [
            *(prints(f"qwen2audio {name} --help", "usage: ") for name in COMMANDS),
            *(prints(f"qwen2audio {name} --help", "--json") for name in ("generate", "evaluate", "plan", "doctor")),
            holds("docs/generate.md", "Exit codes: 0 done, 1"),
        ],
    ),
    6: Point(
        "Progress",
        [
            tests("tests/test_progress.py tests/test_train_metrics.py -k 'progress or bar or line'"),
            *(prints(f"qwen2audio {name} --help", "--quiet") for name in ("convert", "train", "batch", "doctor")),
        ],
        long=True,
    ),
    7: Point("Formats", [tests("tests/test_formats.py tests/test_load_audio.py tests/test_whole_files.py")], long=True),
    8: Point("Buckets", [tests("tests/test_buckets.py"), tests("tests/test_gcs.py -m ''")], long=True),
    9: Point(
        "Pod start",
        [
            holds("docs/pods.md", "## One TPU VM", "## All workers of a pod", "## GPU", "## Slurm"),
            tests("tests/test_docs.py -k options"),
            tests("tests/test_machine.py tests/test_examples.py"),
            seen("run on a pod", so=False),
        ],
        long=True,
    ),
    10: Point(
        "Notebooks",
        [("outputs and plots", notebook_outputs), tests("tests/test_notebooks.py -m ''")],
        long=True,
    ),
    11: Point("Client", [tests("tests/test_serve.py")], long=True),
    12: Point(
        "Cards",
        [
            tests("tests/test_train_export.py tests/test_export.py -k card"),
            holds(
                "qwen2audio_jax/embedded/speech/README.md", "model-index:", "data SHA-256", "## Scores", "base model"
            ),
        ],
        long=True,
    ),
    13: Point("Dated numbers", [("command, hardware, date", dated_numbers)]),
    14: Point(
        "Docs",
        [tests("tests/test_docs.py -m ''"), prints("mkdocs build --strict --site-dir /tmp/qwen2audio-site", "")],
        long=True,
    ),
    15: Point("Import time", [("import, --version, --help, errors", quick_start)]),
    16: Point("Corners", [holds(".ci/run", "python3.12", "pytest -m smoke", "parity"), files(".ci/run")]),
    17: Point("Types", [prints("mypy", "Success"), files("qwen2audio_jax/py.typed")], long=True),
    18: Point(
        "Project files",
        [
            files("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "CODE_OF_CONDUCT.md"),
            files(".pre-commit-config.yaml", ".github/ISSUE_TEMPLATE/fault.yml", ".github/workflows/ci.yml"),
            files("docs/versions.md", "docs/releasing.md", "docker/cpu.Dockerfile", "docker/cuda.Dockerfile"),
            holds(".github/ISSUE_TEMPLATE/fault.yml", "qwen2audio doctor --json"),
            ("one version", one_version),
        ],
    ),
    19: Point("Complaints", [tests("tests/test_docs.py -k questions")]),
    20: Point(
        "A stranger fine-tunes",
        [
            tests("tests/test_train_loop.py::test_killed_at_any_moment_it_continues_with_the_same_losses -m ''"),
            tests("tests/test_train_export.py::test_transformers_and_this_package_load_it"),
            files("examples/fine_tune_lora.ipynb"),
            seen("by the page and the notebook alone: other records, a run, its adapter loaded"),
        ],
        long=True,
    ),
}


def score(point: Point) -> tuple[int, list[str]]:
    """0, 1 or 2, and what is missing."""
    missing = [f"{name}: {found}" for name, check in point.checks if (found := check()) is not None]
    held = len(point.checks) - len(missing)
    return (2 if not missing else 1 if 2 * held >= len(point.checks) else 0), missing


def main() -> None:
    """Score the points that are asked for, and print them as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=POINTS, metavar="N", default=list(POINTS))
    parser.add_argument("--quick", action="store_true", help="leave out what takes more than ten seconds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    for number in options.only:
        point = POINTS[number]
        if options.quick and point.long:
            continue
        found[number] = score(point)
        if not options.json:
            print(f"| {number} | {point.name} | {found[number][0]} | {'; '.join(found[number][1])} |", flush=True)
    total = sum(points for points, _ in found.values())
    if options.json:
        print(json.dumps({"total": total, "of": 2 * len(found), "points": found}))
    else:
        print(f"{total} of {2 * len(found)}")


if __name__ == "__main__":
    main()

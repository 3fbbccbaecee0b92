"""The pages: what they claim about messages, tests and limits is so, and their commands run as they stand."""

import ast
import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from qwen2audio_jax.limits import LIMITS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
UNITS = {"": 1, "s": 1, "MiB": 1 << 20, "GiB": 1 << 30}


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of a page's blocks, in order."""
    return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def string_of(node: ast.AST) -> str | None:
    """A text of the source, its values written as `...`; None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
    return None


@cache
def texts_of_the_code() -> list[str]:
    files = [*(ROOT / "qwen2audio_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return [text for text in map(string_of, nodes) if text]


def test_every_message_of_the_error_table_is_in_the_code():
    messages = re.findall(r"^\| `(.+?)` \|", page("errors"), flags=re.MULTILINE)
    assert len(messages) > 40
    for message in messages:
        parts = [part.strip(" :;") for part in message.split("...")]
        words = [part for part in parts if len(part) > 3]
        assert words, message
        assert any(all(word in text for word in words) for text in texts_of_the_code()), message


def test_every_answer_of_the_questions_and_every_promise_names_a_test_that_there_is():
    answers = page("faq").split("\n## ")[1:]
    answers += page("reliability").partition("\n## ")[0].split("\n- ")[1:]
    assert len(answers) > 20
    for answer in answers:
        names = re.findall(r"`(tests/\w+\.py)::([\w:]+)`", answer)
        assert names, answer.splitlines()[0]
        for file, name in names:
            *classes, function = name.split("::")
            body = ast.parse((ROOT / file).read_text()).body
            for each in classes:
                (body,) = (node.body for node in body if isinstance(node, ast.ClassDef) and node.name == each)
            assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_the_page_of_limits_is_the_table_of_limits():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) ?(\w*) \|", page("limits"), flags=re.MULTILINE)
    assert {name: float(number) * UNITS[unit] for name, number, unit in rows} == dataclasses.asdict(LIMITS)


def test_settings_and_records_of_the_pages_are_read(tmp_path):
    from qwen2audio_jax.batch.records import read_record as read_batch
    from qwen2audio_jax.train.records import read_record as read_training
    from qwen2audio_jax.train.settings_file import read_settings

    (settings,) = [code for _, code in blocks(page("fine-tuning"), "toml")]
    (tmp_path / "run.toml").write_text(settings)
    assert read_settings(tmp_path / "run.toml").lora.rank == 16
    (records,) = [code for _, code in blocks(page("fine-tuning"), "json")]
    for line in records.splitlines():
        assert read_training(line.encode(), where="page:1", audio_root="", preferences=False).clips
    (records,) = [code for _, code in blocks(page("batch"), "json")]
    for line in records.splitlines():
        assert read_batch(line.encode(), id="1", where="page:1", root="/", prompt=None).problem is None, line


def test_the_contents_name_pages_that_there_are_and_every_link_between_pages_leads_somewhere():
    yaml = pytest.importorskip("yaml")
    said = re.findall(r"[\w-]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(said) == len(set(said))
    assert set(said) <= {file.name for file in DOCS.glob("*.md")}
    for file in [*DOCS.glob("*.md"), ROOT / "README.md", *ROOT.glob("[A-Z]*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
        named = re.findall(
            r"`((?:benchmarks|configs|docker|docs|examples|qwen2audio_jax|tests)/[\w./-]+)", file.read_text()
        )
        assert not [path for path in named if not (ROOT / path.rstrip("/.")).exists()], file.name


def test_numbers_have_a_command_hardware_and_a_date_and_the_version_is_one(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import score

    assert score.dated_numbers() is None
    assert score.one_version() is None
    assert score.notebook_outputs() is None


def test_pictures_are_those_that_were_measured():
    for name in ("side_by_side.png",):
        assert (DOCS / "images" / name).read_bytes() == (ROOT / "benchmarks" / "results" / name).read_bytes()


def test_container_files_copy_what_there_is_and_run_as_nobody_special():
    for file in (ROOT / "docker").glob("*.Dockerfile"):
        lines = file.read_text().splitlines()
        copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
        assert all((ROOT / word).exists() for word in copied if not word.startswith(("-", "/"))), file.name
        assert "USER 10001" in lines
        if (linter := shutil.which("hadolint")) is not None:
            done = subprocess.run([linter, str(file)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.slow(seconds=10)
def test_the_pages_build(tmp_path):
    """Strictly: every link, every anchor and every name of the API."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    html = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("from_pretrained", "num_return_sequences", "AudioError"):
        assert name in html


@pytest.mark.slow(seconds=25)
def test_the_first_steps_as_typed(tmp_path):
    """Each block in a shell, one behind the other, and what stands below it comes out."""
    (tmp_path / "qwen2audio_jax").symlink_to(ROOT / "qwen2audio_jax")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "QWEN2AUDIO_CACHE": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
    }
    text = page("first-steps").partition("## The published model")[0]
    expected = []
    for language, code in blocks(text, "sh", "python", "text"):
        if language == "text":
            assert code == expected[-1]
        elif "pip install" not in code:
            program = ["bash", "-ec"] if language == "sh" else [sys.executable, "-c"]
            done = subprocess.run([*program, code], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            expected.append(done.stdout)
    assert len(expected) == 5


def test_commands_of_the_pages_have_options_that_there_are():
    """Every `qwen2audio` command of every page is taken by the parser; `convert` has one of its own."""
    from qwen2audio_jax.cli.main import build_parser

    parser, seen = build_parser(), 0
    names = set(parser._subparsers._group_actions[0].choices) - {"convert"}
    command = re.compile(rf"""(?:^|[\s'])qwen2audio ((?:{"|".join(names)})\b(?:"[^"]*"|[^|;&>'"\n])*)""")
    for file in sorted([*DOCS.glob("*.md"), ROOT / "README.md"]):
        for _, code in blocks(file.read_text(encoding="utf-8"), "sh", "text"):
            for found in command.findall(code.replace("\\\n", " ")):
                refused = ""
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    try:
                        parser.parse_args(shlex.split(found, comments=True))
                    except SystemExit:
                        refused = said.getvalue()
                assert not refused, f"{file.name}: {found}: {refused}"
                seen += 1
    assert seen > 30

"""The architecture's own rules: imports run one way, modules are pure, nothing heavy or foreign at run time."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qwen2audio_jax"

# The rooms of the house, lowest first: a room may import from its own floor and from those below it.
FLOORS = (
    ("limits", "_version", "command_line", "installed", "lazy"),
    ("storage", "embedded", "configs"),
    ("config", "audio"),
    ("parallel", "torch_style"),
    ("model",),
    ("generation",),
    ("checkpoint",),
    ("convert",),
    ("source",),
    ("processing", "api", "audio_encoder"),
    ("engine",),
    ("tasks",),
    ("batch", "compat", "ray", "serve"),
    ("evaluation",),
    ("train",),
    ("speech", "plan"),
    ("cli", "__main__", "__init__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Only these convert anything, and they import the converter where they use it.
CONVERTING = ("source", "cli.main", "cli.completion")


@cache
def sources() -> dict[str, Path]:
    """Every module of the package by its name within it; `convert` stands beside the package."""
    found = {}
    for folder, prefix in ((PACKAGE, ()), (ROOT / "convert", ("convert",))):
        for path in sorted(folder.rglob("*.py")):
            parts = [*prefix, *path.relative_to(folder).with_suffix("").parts]
            if folder == PACKAGE and len(parts) > 1 and (PACKAGE / parts[0]).is_symlink():
                continue
            found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str):
    """(imported module of the package or other module, whether at the top of the file) of a module's imports."""
    tree = ast.parse(sources()[name].read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join(filter(None, ["qwen2audio_jax", name.partition(".")[0], module]))
            names = [f"{module}.{alias.name}" for alias in node.names]
        for full in names:
            root, _, rest = full.partition(".")
            if root == "qwen2audio_jax":
                while rest not in sources() and rest:
                    rest = rest.rpartition(".")[0]
                full = f"qwen2audio_jax.{rest or '__init__'}"
            yield full, node in tree.body


def test_every_module_has_a_room():
    assert {name.partition(".")[0] for name in sources()} <= set(FLOOR)


@pytest.mark.parametrize("name", sources())
def test_imports_run_one_way(name):
    room = name.partition(".")[0]
    for full, at_top in imports(name):
        root, _, other = full.partition(".")
        assert root not in {"torch", "transformers", "pickle", "requests"}, f"{name} imports {full}"
        if root != "qwen2audio_jax":
            continue
        if other.partition(".")[0] == "convert" != room:
            assert name in CONVERTING, f"{name} imports {full}: what run time needs of it belongs into checkpoint"
            assert not at_top, f"{name} must import {full} where it is used"
        assert FLOOR[other.partition(".")[0]] <= FLOOR[room], f"{name} reaches up to {full}"


def test_imports_make_no_circle():
    """Imports within functions and for type checkers included."""
    graph = {
        name: {full.partition(".")[2] for full, _ in imports(name) if full.startswith("qwen2audio_jax.")} - {name}
        for name in sources()
    }
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("name", ["layers", "encoder", "decoder", "qwen2_audio"])
def test_modules_assign_nothing_outside_init(name):
    """A jitted function drops what a module assigns in a call, without a word."""
    for node in ast.walk(ast.parse((PACKAGE / "model" / f"{name}.py").read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                targets = [
                    target
                    for statement in ast.walk(method)
                    if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign)
                    for target in getattr(statement, "targets", None) or [statement.target]
                ]
                stored = [t for t in targets for n in ast.walk(t) if isinstance(n, ast.Attribute)]
                assert not stored, f"{node.name}.{method.name} assigns to an attribute"


def test_tests_change_a_shared_module_for_one_of_ours_alone():
    """Changed through ours, `time.sleep` changes for threads that other tests left running too: see `stand_in`."""
    shared = re.compile(r"setattr\(\s*(\w+\.)?(time|socket|threading|queue),")
    files = (ROOT / "tests").glob("*.py")
    assert [file.name for file in files if shared.search(file.read_text(encoding="utf-8"))] == []


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    # The second process finds the programs of the first.
    env = {
        **os.environ,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        **environment,
    }
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


TINY_RUN = """
import conftest, tiny, jax, numpy as np
from prompts import random_inputs
from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.qwen2_audio import init_params
config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["tied"])
model = Qwen2AudioForConditionalGeneration(config, jax.jit(lambda: init_params(config, seed=0))())
print(model.generate(**random_inputs("tied"), max_new_tokens=3)[:, -3:].tolist())
"""


GUARD = """
import socket, sys
def refuse(*a, **k): raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.bind = socket.create_connection = socket.getaddrinfo = refuse
import qwen2audio_jax
heavy = {"librosa", "soundfile", "av", "torch", "transformers", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_run_opens_no_socket_loads_nothing_heavy_and_is_the_same_in_the_tree_mode_of_nnx():
    plain = run(GUARD + TINY_RUN)
    trees = run(TINY_RUN, NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false")
    assert plain.returncode == trees.returncode == 0, plain.stderr + trees.stderr
    assert plain.stdout == trees.stdout

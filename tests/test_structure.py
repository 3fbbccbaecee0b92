"""Architecture rules: imports in one direction, pure modules, and no heavy or foreign packages at run time."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qwen2audio_jax"

# The layers of the package, lowest first: a module may import from its own layer and from those below it.
FLOORS = (
    {"limits", "lengths", "hub", "embedded", "places", "roll_call", "device_order", "mesh_presets"},
    {
        "distributed",
        "config_json",
        "config_encoder",
        "config_text",
        "config",
        "stopping",
        "text_stream",
        "generation_config",
    },
    {"sharding", "quantization"},
    {"shares"},
    {"layers", "cache", "buckets", "sampling", "loss", "manifest", "journal", "checkpoint", "audio", "outputs"},
    {"checkpoint_writer", "cache_folder"},
    {"attention", "flash_attention", "cache_memory"},
    {"encoder", "decoder"},
    {"model", "inputs", "lora", "weights"},
    {"generate", "prefix"},
    {"rows"},
    {"convert", "configs"},
    {"source"},
    {
        "tokenizer",
        "template_sandbox",
        "chat_template",
        "chat_encoding",
        "clips",
        "padding",
        "conversation",
        "feature_extractor",
        "processor_files",
        "processor_output",
        "processor",
    },
    {"api", "session", "audio_encoder", "train"},
    {"speech", "plan"},
    {"cli", "__main__", "__init__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# The converter is imported where it is used, and so are modules that only some commands need.
LAZY = {
    ("source", "convert"),
    ("cli", "convert"),
    ("train", "convert"),
    ("cli", "train"),
    ("cli", "speech"),
    ("cli", "plan"),
}


def sources():
    return [*PACKAGE.rglob("*.py"), *(ROOT / "convert").glob("*.py")]


def module_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "convert"):
        return "convert"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """(imported module name, whether at the top of the file) of every import in a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == "qwen2audio_jax":
                names = [f"qwen2audio_jax.{alias.name}" for alias in node.names]
        for name in names:
            yield name, node in tree.body


def test_every_module_has_a_floor():
    assert {module_of(path) for path in sources()} <= set(FLOOR)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module = module_of(path)
    for name, at_top in imports(path):
        root, _, rest = name.partition(".")
        assert root not in {"torch", "transformers", "pickle", "requests"}, f"{path} imports {name}"
        if root != "qwen2audio_jax" or not rest:
            continue
        other = rest.partition(".")[0]
        if other not in FLOOR or other == module:
            continue  # a name of the package itself, or a neighbour in the same folder
        if (module, other) in LAZY:
            assert not at_top, f"{path} must import {name} where it is used"
        elif module == "convert":
            # The converter stands on the lower floors: parameter declarations, configuration, checkpoint.
            assert other in {
                *("config", "config_json", "checkpoint", "checkpoint_writer", "cache_folder", "places"),
                *("manifest", "hub", "model", "lora", "limits", "sharding", "quantization"),
            }, f"{path}: {name}"
        else:
            assert FLOOR[other] <= FLOOR[module], f"{path} reaches up to {name}"


@pytest.mark.parametrize("name", ["layers", "encoder", "decoder", "model"])
def test_modules_assign_nothing_outside_init(name):
    """A jitted function drops what a module assigns in a call, without a word."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
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


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


TINY_RUN = """
import conftest, tiny, jax, numpy as np
from prompts import random_inputs
from qwen2audio_jax.api import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model import init_params
config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
model = Qwen2AudioForConditionalGeneration(config, init_params(config, seed=0))
print(model.generate(**random_inputs("gqa"), max_new_tokens=3)[:, -3:].tolist())
"""


def test_the_tree_mode_of_nnx_gives_the_same():
    plain = run(TINY_RUN)
    trees = run(TINY_RUN, NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false")
    assert plain.returncode == trees.returncode == 0, plain.stderr + trees.stderr
    assert plain.stdout == trees.stdout


def test_importing_and_generating_open_no_socket_and_load_nothing_heavy():
    guard = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.socket.bind = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import qwen2audio_jax\n"
        "heavy = {'librosa', 'soundfile', 'av', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run(guard + TINY_RUN)
    assert result.returncode == 0, result.stderr

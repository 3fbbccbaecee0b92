"""Hostile checkpoints for `test_fuzz` and benchmarks/fuzz_checkpoints.py, and what must hold of every one of them."""

import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiny
from hypothesis import strategies as st

from qwen2audio_jax.checkpoint import hf_folder, safetensors_file
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.convert import match_tensors

SECONDS = 20
CONFIG = Qwen2AudioConfig.from_dict(tiny.CONFIGS["tied"])

_NUMBERS = st.one_of(
    st.integers(0, 40),
    st.integers(-3, 3),
    st.sampled_from([1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**40]),
)
_JUNK = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_DTYPES = st.sampled_from([*safetensors_file._ITEM_BYTES, "F4", "", "f32", "BF16 "])
_NAMES = st.one_of(
    st.sampled_from(
        [
            "lm_head.weight",
            "model.audio_tower.conv1.bias",
            "language_model.model.norm.weight",
            "base_model.model.language_model.embed_tokens.weight",
            "model." * 2000 + "x",
            "__metadata__",
        ]
    ),
    st.text(max_size=8),
)
_FILES = st.one_of(
    st.sampled_from(
        [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "../outside.safetensors",
            "linked.safetensors",
            "folder.safetensors",
            "./model-00001-of-00002.safetensors",
            "folder.safetensors/../../outside.safetensors",
            "/etc/passwd",
            "/proc/self/environ",
            "~/x.safetensors",
            "nul\0.safetensors",
            "a" * 300 + ".safetensors",
            "model-00001-of-00002.safetensors/",
            "\ud800.safetensors",
            "none.safetensors",
        ]
    ),
    st.text(max_size=6).map(lambda text: text + ".safetensors"),
    _JUNK,
)


@st.composite
def entries(draw) -> dict:
    """A header whose tensors lie one after the other, some of them spoilt."""
    header, place = {}, 0
    for name in draw(st.lists(_NAMES, max_size=4, unique=True)):
        dtype = draw(_DTYPES)
        shape = draw(st.lists(st.integers(0, 6), max_size=4))
        length = int(np.prod(shape, dtype=object)) * safetensors_file._ITEM_BYTES.get(dtype, 4)
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + length]}
        place += length
        for key in draw(st.lists(st.sampled_from(["dtype", "shape", "data_offsets", "more", "none"]), max_size=2)):
            if key in ("shape", "data_offsets"):
                entry[key] = draw(st.lists(_NUMBERS, max_size=4) | _JUNK)
            elif key == "none":
                entry.pop("dtype", None)
            else:
                entry[key] = draw(_JUNK)
        header[name] = entry
    return header


@st.composite
def files(draw) -> bytes:
    """A safetensors file: whole, or with a header that lies, or with damaged bytes."""
    header = draw(st.one_of(entries(), entries(), _JUNK))
    text = draw(st.one_of(st.just(json.dumps(header).encode()), st.binary(max_size=40)))
    if draw(st.integers(0, 9)) == 0:
        text = text * 2
    length = draw(st.one_of(st.just(len(text)), st.just(len(text)), st.integers(0, (1 << 64) - 1)))
    data = _data_bytes(header)
    size = draw(st.one_of(st.just(data), st.just(data), st.integers(0, 500)))
    content = bytearray(length.to_bytes(8, "little") + text + bytes(size))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        content[place : place + 1] = draw(st.binary(max_size=2))
    return bytes(content[: draw(st.sampled_from([None, None, None, 4, 8, 20]))])


def _data_bytes(header: object) -> int:
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and offsets and type(offsets[-1]) is int and 0 <= offsets[-1] < 10_000:
            ends.append(offsets[-1])
    return max(ends)


@st.composite
def folders(draw) -> dict[str, bytes]:
    """The files of a folder: a single one, or two with an index."""
    if draw(st.booleans()):
        return {"model.safetensors": draw(files())}
    pair = {f"model-0000{k}-of-00002.safetensors": draw(files()) for k in (1, 2)}
    weight_map = draw(st.dictionaries(_NAMES, _FILES, max_size=4) | _JUNK)
    index = draw(st.sampled_from([{"metadata": {}, "weight_map": weight_map}, weight_map]))
    text = draw(st.one_of(st.just(json.dumps(index).encode()), st.binary(max_size=30)))
    return {**pair, "model.safetensors.index.json": text}


_watched: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and _watched is not None and isinstance(arguments[0], (str, bytes)):
        _watched.append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def watched_opens():
    """The paths of all files that are opened meanwhile."""
    global _watched
    _watched = paths = []
    try:
        yield paths
    finally:
        _watched = None


def attempt(contents: dict[str, bytes]) -> bool:
    """Read a folder with these files, all there is in it. True if it was read, False if it was refused.

    Only a `ValueError` refuses; nothing outside the folder is opened; it takes less than `SECONDS`.
    """
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        folder = place / "src"
        folder.mkdir()
        (place / "outside.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
        (folder / "linked.safetensors").symlink_to(place / "outside.safetensors")
        (folder / "folder.safetensors").mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        with _time_limit(), watched_opens() as opened:
            accepted = _read(folder)
        strays = [path for path in opened if Path(os.path.realpath(path)).parent != folder.resolve()]
        strays = [path for path in strays if path.endswith(".safetensors") or not path.endswith((".py", ".pyc"))]
        assert not strays, strays
        return accepted
    finally:
        shutil.rmtree(place)


def _read(folder: Path) -> bool:
    try:
        with hf_folder.open_weights(folder) as weights:
            for tensor in weights.tensors:
                if tensor.entry.dtype in safetensors_file.DTYPES:
                    assert sum(block.nbytes for _, block in tensor.blocks()) == tensor.entry.nbytes
            if not weights.problems:
                match_tensors.match(weights, config=CONFIG, folder=folder)
            return True
    except ValueError as error:
        return "do not match config.json" in str(error)  # as far as any of these gets


@contextmanager
def _time_limit():
    def expired(number, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

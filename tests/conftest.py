"""Eight fake devices, a compilation cache and the tiny reference models that the tests share.

Several files run side by side with pytest-xdist; what is marked slow is left out (see pyproject.toml).
"""

import os
from pathlib import Path

from xla_flags import quick_flags

# Before jax is imported: the device count is read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = quick_flags(devices=8, by_hand=os.environ.get("XLA_FLAGS"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The processes that tests start share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import copy
import functools
import importlib.util
from functools import cache

import jax
import pytest
import tiny
from hf_layout import random_tensors, write_hf_checkpoint
from slow_shares import deal

from qwen2audio_jax import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.cli import status
from qwen2audio_jax.model.decoder import Decoder
from qwen2audio_jax.model.encoder import Encoder
from qwen2audio_jax.tasks import Tasks

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (  # noqa: SIM905
    "test_train_step test_generate test_engine test_session test_lora test_parity test_int8 test_shares test_cli "
    "test_warmup test_train_dpo test_train_loop"
).split()
"""Files that begin first, so that none of them is left over at the end."""


def pytest_addoption(parser):
    parser.addoption(
        "--slow-share", metavar="K/N", help="with -m slow: the Kth of N shares of about equal time (see slow_shares)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Spreads files over the cores; what is typed by hand in one file runs in this process, as does all with -n0."""
    if getattr(config.option, "numprocesses", 0) is not None or "PYTEST_XDIST_WORKER" in os.environ:
        return  # without xdist, chosen by hand, or one of those that are spread over
    if config.option.usepdb or config.option.collectonly:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    files = {argument.partition("::")[0] for argument in config.args}
    if any(Path(file).is_dir() for file in files):
        workers = min(cores, 4)
    else:
        workers = min(cores, 4, len(files))
    if workers > 1:
        config.option.numprocesses, config.option.dist = workers, "loadfile"
        config.option.loadscopereorder = False
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(cores // workers))


def pytest_collection_modifyitems(config, items):
    """Marks what compares numbers with the reference, takes a share of what is slow, and puts the longest files first.

    `-m parity` runs those comparisons on another processor, or as if on one.
    """
    for item in items:
        if {"reference", "exact_features"} & set(item.fixturenames):
            item.add_marker("parity")
    if config.option.slow_share:
        number, shares = map(int, config.option.slow_share.split("/"))
        # Long jobs and what is slow otherwise are dealt apart.
        jobs = config.option.markexpr == "long_job"
        items[:] = [item for item in items if (item.get_closest_marker("long_job") is not None) == jobs]
        share = set(deal(items, shares)[number % shares][1])
        items[:] = [item for item in items if item in share]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_said_of_what_takes_long():
    """A slow machine gets the same words as a quick one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status, "LOG_SECONDS", 1e6)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """`Tasks` of the embedded model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2AUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        with Tasks.from_pretrained() as found:
            yield found


@cache
def build_reference(name: str):
    """The transformers model of a tiny configuration: float32, evaluation mode, the weights of `hf_layout`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2AudioConfig.from_dict(copy.deepcopy(tiny.CONFIGS[name]))
    model = transformers.Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="eager")
    weights = random_tensors(tiny.CONFIGS[name], seed=tiny.SEEDS[name])
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    # This release of the reference reads the flag that ties the head and never ties: equal values are the same model.
    tensors.setdefault("lm_head.weight", tensors["model.language_model.embed_tokens.weight"].clone())
    model.load_state_dict(tensors, strict=True)
    return model.float().eval()


@pytest.fixture(scope="session")
def reference():
    """`reference(name)`: the transformers model of `tiny.CONFIGS[name]`; skips where transformers is missing."""
    return build_reference


@pytest.fixture(scope="session")
def exact_features():
    """transformers' feature extractor, from here on by its float64 path in numpy.

    The one in torch is float32: how far it is from this depends on the processor's transform.
    """
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "_torch_extract_fbank_features", extractor._np_extract_fbank_features)
        yield extractor


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory):
    """`hf_checkpoint(name)`: a directory that transformers saved, with processor and generation files beside it."""

    @cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(f"hf_{name}")
        write_hf_checkpoint(folder, name)
        (folder / "model.safetensors").unlink()
        build_reference(name).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def load(hf_checkpoint, tmp_path_factory):
    """`load(name, mesh=None)`: our model of the reference's weights, by way of the converter.

    The reference writes the checkpoint where it is installed; elsewhere the same weights are written without it.
    """
    places = tmp_path_factory.mktemp("converted")
    oracle = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")

    @cache
    def build(name: str, mesh=None):
        if oracle:
            folder = hf_checkpoint(name)
        else:
            folder = places / f"hf_{name}"
            write_hf_checkpoint(folder, name)
        return Qwen2AudioForConditionalGeneration.from_pretrained(folder, mesh=mesh, cache_dir=places)

    return build


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> Path:
    """A folder with one tiny model in both layouts: `hf` and `orbax`."""
    from qwen2audio_jax.convert import convert

    place = tmp_path_factory.mktemp("layouts")
    write_hf_checkpoint(place / "hf", "gqa", naming="old", dtype="bfloat16", shards=3)
    convert(place / "hf", place / "orbax")
    return place


@pytest.fixture
def object_store(monkeypatch, tmp_path):
    """`store://` and `memory://`, empty: see `object_store`."""
    import object_store

    yield from object_store.cleared(monkeypatch, tmp_path)


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The parameters that the converter makes from now on."""
    from qwen2audio_jax.convert import convert_tensor

    names = []

    def read_parameter(tensor, target, **options):
        names.append(target.parameter)
        return original(tensor, target, **options)

    original = convert_tensor.read_parameter
    monkeypatch.setattr(convert_tensor, "read_parameter", read_parameter)
    return names


@pytest.fixture
def programs(monkeypatch):
    """Names of the programs that were lowered or compiled since, and of the modules that were traced."""
    names = []

    def listener(event, seconds, fun_name=None, **_):
        if "backend_compile" in event or "jaxpr_to_mlir" in event:
            names.append(fun_name)

    def counted(module, call):
        @functools.wraps(call)
        def wrapper(self, *arguments, **more):
            names.append(module.__name__)
            return call(self, *arguments, **more)

        return wrapper

    for module in (Decoder, Encoder):
        monkeypatch.setattr(module, "__call__", counted(module, module.__call__))
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield names
    jax.monitoring.unregister_event_duration_listener(listener)

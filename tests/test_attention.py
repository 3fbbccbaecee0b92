"""The implementations of attention: each against the plain one, which the parity tests hold to the reference.

The TPU's kernel runs in JAX's interpreter here and is compiled for TPUs in test_tpu_attention.py; cuDNN needs an NVIDIA
GPU, so its arguments are checked in JAX's own plain form, and that its call is in the program lowered for one.
"""

import json
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from judge import relative_error

from qwen2audio_jax import Qwen2AudioEncoder, Qwen2AudioForConditionalGeneration, make_mesh
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model import attention, kv_cache, plain_attention, qwen2_audio
from qwen2audio_jax.model.attention import Seen, attend, check_attention, choose_attention
from qwen2audio_jax.model.flash_attention import cudnn_attention, pallas_attention

AXES = ("batch", "heads", "kv_heads")
interpreted = partial(pallas_attention, interpret=True)
plainly = partial(cudnn_attention, implementation="xla")

# tokens, heads, key/value heads, head dim, causal, valid keys of each row
SHAPES = {
    "encoder, ragged, 150 is no block": (150, 5, 5, 10, False, [150, 1, 77]),
    "encoder, whole blocks of padding": (640, 2, 2, 8, False, [640, 130, 3]),
    "encoder, a padded row of the batch": (130, 2, 2, 24, False, [0, 130]),
    "encoder, all valid, no block": (200, 3, 3, 16, False, None),
    "prefill, grouped heads": (257, 8, 2, 16, True, None),
    "prefill, one key head": (130, 6, 1, 10, True, None),
    "prefill, one block": (128, 4, 4, 32, True, None),
    "both": (300, 4, 2, 16, True, [300, 41]),
}


def operands(shape, dtype=jnp.float32, *, seed=0):
    tokens, heads, kv_heads, size, causal, lengths = shape
    rows = 2 if lengths is None else len(lengths)
    rng = np.random.default_rng(seed)

    def draw(*dims):
        return jnp.asarray(rng.normal(size=dims), dtype)

    seen = {"causal": causal, "lengths": None if lengths is None else jnp.asarray(lengths, jnp.int32)}
    k, v = draw(rows, kv_heads, tokens, size), draw(rows, kv_heads, tokens, size)
    return (draw(rows, tokens, heads, size), k, v), seen


def with_valid_keys(array, seen):
    """Rows without any key mean nothing."""
    return np.asarray(array, np.float32)[[True] * len(array) if seen["lengths"] is None else seen["lengths"] > 0]


def kernels(monkeypatch, kernel):
    """Every kernel is this one from now on."""
    monkeypatch.setattr(attention, "_KERNELS", {"pallas": kernel, "cudnn": kernel})


def test_plain_attention_sees_what_it_is_told():
    """Against a loop over rows, heads, queries and keys in numpy."""
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 2, 7, 5)), rng.normal(size=(2, 2, 7, 5))
    starts, lengths = [4, 0], [7, 2]
    segments = np.array([[1, 1, 2], [1, 2, 2]])

    def expected(visible, keys):
        out = np.zeros_like(q)
        for row, token, head in np.ndindex(2, 3, 4):
            seen = [s for s in range(keys) if visible(row, token, s)]
            scores = np.exp([q[row, token, head] @ k[row, head // 2, s] for s in seen])
            out[row, token, head] = scores / scores.sum() @ v[row, head // 2, seen]
        return out

    def ours(keys, **seen):
        arrays = [jnp.asarray(array, jnp.float32) for array in (q, k[:, :, :keys], v[:, :, :keys])]
        return attend(*arrays, Seen(**seen), axes=AXES, attention="xla")

    cached = ours(7, causal=True, starts=jnp.array(starts))
    assert relative_error(cached, expected(lambda row, token, s: s <= starts[row] + token, 7)) < 1e-5
    ragged = ours(7, causal=False, lengths=jnp.array(lengths))
    assert relative_error(ragged, expected(lambda row, token, s: s < lengths[row], 7)) < 1e-5
    packed = ours(3, causal=True, segments=jnp.array(segments))
    together = expected(lambda row, token, s: s <= token and segments[row, s] == segments[row, token], 3)
    assert relative_error(packed, together) < 1e-5


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "causal"),
    [(1, 1, 40, False), (3, 1, 40, False), (2, 300, 300, True), (1, 530, 530, True), (2, 530, 530, False)],
)
@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_forms_for_cpus_agree_with_the_one_for_other_devices(rows, queries, keys, causal, dtype, bar, groups):
    rng = np.random.default_rng(2)
    shapes = (rows, 2, groups, queries, 8), (rows, 2, keys, 8), (rows, 2, keys, 8)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    mask = jnp.arange(keys) < jnp.arange(keys - rows, keys)[:, None, None]
    if causal:
        mask = mask & (jnp.arange(keys) <= jnp.arange(queries)[:, None])
    expected = plain_attention._grouped(q, k, v, mask).transpose(0, 3, 1, 2, 4).reshape(rows, queries, -1, 8)
    flat = q.transpose(0, 3, 1, 2, 4).reshape(rows, queries, -1, 8)
    got = plain_attention.plain_attention(flat, k, v, jnp.broadcast_to(mask, (rows, queries, keys)), causal=causal)
    assert got.dtype == expected.dtype
    assert relative_error(got, expected) < bar


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_position_is_written_at_each_rows_own_place(rows, dtype):
    rng = np.random.default_rng(3)
    buffer = jnp.asarray(rng.integers(-100, 100, (rows, 2, 6, 4)), dtype)
    new, starts = jnp.asarray(rng.integers(-100, 100, (rows, 2, 1, 4)), dtype), np.arange(rows) + 2
    expected = np.array(buffer.astype(jnp.float32))
    for row, start in enumerate(starts):
        expected[row, :, start] = new[row, :, 0]
    np.testing.assert_array_equal(kv_cache._written(buffer, new, jnp.asarray(starts)).astype(jnp.float32), expected)


@pytest.mark.parametrize("kernel", [interpreted, plainly], ids=["pallas", "cudnn"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_agree_with_the_plain_form(monkeypatch, kernel, shape):
    kernels(monkeypatch, kernel)
    arrays, seen = operands(shape)
    plain = attend(*arrays, Seen(**seen), axes=AXES, attention="xla")
    got = jax.jit(partial(attend, axes=AXES, attention="pallas"))(*arrays, Seen(**seen))
    assert np.isfinite(got).all()
    assert relative_error(with_valid_keys(got, seen), with_valid_keys(plain, seen)) < 1e-5


@pytest.mark.parametrize("name", ["encoder, ragged, 150 is no block", "prefill, grouped heads"])
def test_in_bfloat16_no_further_from_float32_than_the_plain_form(monkeypatch, name):
    kernels(monkeypatch, interpreted)
    exact, seen = operands(SHAPES[name])
    exact = attend(*exact, Seen(**seen), axes=AXES, attention="xla")
    arrays, _ = operands(SHAPES[name], jnp.bfloat16)
    plain = attend(*arrays, Seen(**seen), axes=AXES, attention="xla")
    flash = attend(*arrays, Seen(**seen), axes=AXES, attention="pallas")
    assert flash.dtype == jnp.bfloat16
    # The inputs are rounded to eight bits before either begins.
    assert relative_error(plain, exact) < 2e-2
    assert relative_error(flash, exact) < 2e-2


def test_kernels_are_for_whole_prompts_and_clips(monkeypatch):
    """What they have no form for is plain, whatever is chosen: a cache, packed rows, on TPUs less than a block."""

    def refuse(*arrays, **seen):
        raise AssertionError("a kernel was called")

    kernels(monkeypatch, refuse)
    arrays, _ = operands((128, 2, 2, 8, True, None))
    numbers = jnp.ones((2, 128), jnp.int32)
    attend(*arrays, Seen(causal=True, starts=numbers[:, 0]), axes=AXES, attention="pallas")
    attend(*arrays, Seen(causal=True, segments=numbers), axes=AXES, attention="cudnn")
    few, _ = operands((127, 2, 2, 8, True, None))
    attend(*few, Seen(causal=True), axes=AXES, attention="pallas")
    for name in ("pallas", "cudnn"):
        with pytest.raises(AssertionError, match="a kernel was called"):
            attend(*arrays, Seen(causal=True), axes=AXES, attention=name)


@pytest.mark.parametrize("sizes", [(2, 4), (8, 1)], ids=["2x4", "8x1"])
def test_on_a_mesh_each_device_runs_its_own_rows_and_heads(monkeypatch, sizes):
    """The whole model, grouped heads: clips of several lengths, prompts of several, against one device without."""
    kernels(monkeypatch, interpreted)
    config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
    params = jax.jit(lambda: qwen2_audio.init_params(config, seed=0))()
    rng = np.random.default_rng(5)
    features = rng.normal(size=(8, config.audio_config.num_mel_bins, 300)).astype(np.float32)
    frames = np.array([300, 3, 57, 121, 160, 41, 0, 298], np.int32)
    heard = frames > 2
    ids = rng.integers(0, 300, (8, 140)).astype(np.int32)
    # Of each clip the first vectors, at the row's beginning.
    slots = np.full(ids.shape, -1, np.int32)
    slots[:, :10] = np.where(heard[:, None], 75 * np.arange(8)[:, None], -1)
    lengths = np.array([140, 2, 77, 139, 128, 13, 1, 90], np.int32)
    encode = jax.jit(qwen2_audio.encode_audio, static_argnames=("cfg", "attention"))
    forward = jax.jit(qwen2_audio.forward, static_argnames=("cfg", "attention"))

    def run(mesh, how):
        with jax.set_mesh(mesh):
            found = encode(params, features, frames, cfg=config, attention=how)
            prompt = qwen2_audio.Prompt(ids, lengths, found.projected, slots)
            return jax.device_get((found, forward(params, prompt, cfg=config, attention=how)))

    plain, logits = run(make_mesh(data=1, model=1, devices=jax.devices()[:1]), "xla")
    flash, flash_logits = run(make_mesh(data=sizes[0], model=sizes[1]), "pallas")
    for row, length in enumerate(plain.lengths):
        if length:
            assert relative_error(flash.encoded[row, :length], plain.encoded[row, :length]) < 1e-5
        last = lengths[row]
        assert relative_error(flash_logits[row, :last, :321], logits[row, :last, :321]) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "causal", "said"),
    [(150, True, ["2", "2", "150", "150"]), (150, False, ["1", "8", "150", "150"])],
    ids=["prefill", "encoder"],
)
def test_a_program_for_nvidia_gpus_calls_cudnn(monkeypatch, tokens, causal, said):
    """Lowered without a GPU, for one device's rows and heads of the mesh 2x4; compiled or run it is not."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    axes = AXES if causal else ("clip", "audio_heads", "audio_heads")
    rows = 4 if causal else 8
    q = jax.ShapeDtypeStruct((rows, tokens, 8, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, 4 if causal else 8, tokens, 64), jnp.bfloat16)
    lengths = None if causal else jax.ShapeDtypeStruct((rows,), jnp.int32)
    step = jax.jit(partial(attend, axes=axes, attention="cudnn"))
    with jax.set_mesh(make_mesh(data=2, model=4)):
        program = step.trace(q, k, k, Seen(causal, lengths)).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @(\S+?)\(", program) == ["__cudnn$fmhaSoftmax"]
    settings = program.replace("\\22", '"')
    assert f'"dimensions": {json.dumps(said)}' in settings
    assert f'"mask_type": "{"CAUSAL" if causal else "PADDING"}"' in settings
    assert '"fmha_scale": 1.0' in settings


def gpu(capability="9.0"):
    return SimpleNamespace(platform="gpu", compute_capability=capability)


def on(device):
    return SimpleNamespace(devices=np.array([[device]]))


TPU, CPU = SimpleNamespace(platform="tpu"), SimpleNamespace(platform="cpu")


class TestChoice:
    @pytest.mark.parametrize(
        ("device", "dtype", "chosen"),
        [
            (CPU, "bfloat16", "xla"),
            (CPU, "float32", "xla"),
            (TPU, "bfloat16", "pallas"),
            (TPU, "float32", "xla"),
            (TPU, "float16", "xla"),
            (gpu(), "bfloat16", "cudnn"),
            (gpu("8.0"), "float16", "cudnn"),
            (gpu("12.0"), "bfloat16", "cudnn"),
            (gpu("7.5"), "float16", "xla"),
            (gpu("gfx90a"), "bfloat16", "xla"),
            (gpu(), "float32", "xla"),
        ],
    )
    def test_by_devices_and_dtype(self, device, dtype, chosen):
        assert choose_attention("auto", mesh=on(device), dtype=dtype, head_dims=(64, 128)) == chosen

    def test_of_heads_that_cudnn_does_not_take(self):
        assert choose_attention("auto", mesh=on(gpu()), dtype="bfloat16", head_dims=(64, 10)) == "xla"

    def test_asked_for(self):
        known = {"head_dims": (64, 128)}
        for device in (CPU, TPU, gpu()):
            assert choose_attention("xla", mesh=on(device), dtype="bfloat16", **known) == "xla"
        assert choose_attention("pallas", mesh=on(TPU), dtype="float32", **known) == "pallas"
        assert choose_attention("cudnn", mesh=on(gpu()), dtype="float16", **known) == "cudnn"

    @pytest.mark.parametrize(
        ("asked", "device", "dtype", "head_dims", "said"),
        [
            ("flash", CPU, "float32", (64,), "attention='flash' is not one of 'auto', 'xla', 'cudnn', 'pallas'"),
            ("pallas", CPU, "bfloat16", (64,), "'pallas' needs TPUs, but .* platform 'cpu': use 'auto', 'xla'"),
            ("cudnn", TPU, "bfloat16", (64,), "'cudnn' needs NVIDIA GPUs, but .* 'tpu': use 'auto', 'xla', 'pallas'"),
            ("pallas", gpu(), "bfloat16", (64,), "'pallas' needs TPUs, but .* 'gpu': use 'auto', 'xla', 'cudnn'"),
            ("pallas", TPU, "float16", (64,), "bfloat16 or float32, and the dtype is 'float16'; use 'auto' or 'xla'"),
            ("cudnn", gpu(), "float32", (64,), "bfloat16 or float16, and the dtype is 'float32'"),
            ("cudnn", gpu(), "bfloat16", (64, 160), "a multiple of 8 up to 128, and the model has 160"),
            ("cudnn", gpu(), "bfloat16", (10, 64), "a multiple of 8 up to 128, and the model has 10"),
            ("cudnn", gpu("7.5"), "bfloat16", (64,), "compute capability 8.0, and the GPU has 7.5"),
            ("cudnn", gpu("gfx90a"), "bfloat16", (64,), "compute capability 8.0, and the GPU has gfx90a"),
        ],
    )
    def test_what_cannot_run_is_refused(self, asked, device, dtype, head_dims, said):
        with pytest.raises(ValueError, match=said):
            choose_attention(asked, mesh=on(device), dtype=dtype, head_dims=head_dims)

    def test_before_anything_is_read(self, tmp_path, capsys):
        for kind in (Qwen2AudioForConditionalGeneration, Qwen2AudioEncoder):
            with pytest.raises(ValueError, match="attention='pallas' needs TPUs"):
                kind.from_pretrained(tmp_path / "nothing", attention="pallas")
        arguments = ["generate", "--attention", "cudnn", "--audio", "example:digits-4719", "Which digits are spoken?"]
        assert main(arguments) == 2
        assert "--attention cudnn needs NVIDIA GPUs" in capsys.readouterr().err

    def test_the_model_holds_what_was_chosen(self):
        config = Qwen2AudioConfig.from_dict(tiny.CONFIGS["gqa"])
        got = Qwen2AudioForConditionalGeneration(config, {})
        assert got.attention == "xla"
        check_attention("auto", mesh=got.mesh)

"""Checkpoints of a run: what was saved comes back on any mesh, and a killed writer leaves nothing broken."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen2audio_jax.train import checkpoints as module
from qwen2audio_jax.train.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = {"optimizer": {"learning_rate": 0.1, "betas": (0.9, 0.99)}, "lora": None, "data": {"sha256": "ab"}}

WRITER = """
import sys, numpy as np, jax
from qwen2audio_jax.train.checkpoints import Checkpoints

folder, first = sys.argv[1], int(sys.argv[2])
checkpoints = Checkpoints(folder, keep=2, every=1)
for step in range(first, first + 1000):
    state = {"step": step, "weights": np.random.default_rng(step).standard_normal((1000, 1000), np.float32)}
    state = jax.device_put(state)
    print("saving", step, flush=True)
    checkpoints.save(step, state, identity={"run": 1})
    if step % 2:
        checkpoints.wait()
        print("saved", step, flush=True)
"""


def make_mesh(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def make_state(mesh: Mesh):
    """A state as training has it: moments of some weights, empty nodes, a key, several dtypes."""
    weights = {
        "encoder": {"kernel": jnp.linspace(-1, 1, 8 * 24).reshape(8, 24), "bias": jnp.full(3, 0.1)},
        "layers": [{"scale": jnp.ones(16, jnp.bfloat16)}, {}],
        "none": None,
    }
    trained = {"encoder": {"kernel": True, "bias": False}, "layers": [{"scale": True}, {}], "none": None}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-2, mask=trained), trained), optax.identity()
    )
    state = {
        "step": jnp.int32(0),
        "weights": weights,
        "optimizer": optimizer.init(weights),
        "key": jax.random.PRNGKey(3),
    }

    def place(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
        return NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec())

    shardings = jax.tree.map(place, state)

    def step(state):
        noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), (8, 24))
        gradient = jax.tree.map(jnp.ones_like, state["weights"])
        gradient["encoder"]["kernel"] = noise
        updates, kept = optimizer.update(gradient, state["optimizer"], state["weights"])
        weights = optax.apply_updates(state["weights"], updates)
        return {**state, "step": state["step"] + 1, "weights": weights, "optimizer": kept}

    return jax.device_put(state, shardings), jax.jit(step, donate_argnums=0, out_shardings=shardings)


def structs(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def copied(state):
    return jax.tree.map(lambda leaf: np.array(leaf), state)


def assert_same(state, expected, *, tolerance=0.0):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, value in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == value.dtype
        np.testing.assert_allclose(np.asarray(leaf), value, rtol=0, atol=tolerance)


@pytest.fixture
def opened():
    """Opens `Checkpoints`, which are closed at the end."""
    still: list[Checkpoints] = []

    def start(folder, *, keep=2, every=1) -> Checkpoints:
        still.append(Checkpoints(folder, keep=keep, every=every))
        return still[-1]

    yield start
    for checkpoints in still:
        checkpoints.close()


def small(value: float = 1.0):
    return jax.device_put({"weights": {"a": jnp.full(4, float(value))}, "step": jnp.int32(value)})


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != module.LOCK)


@pytest.mark.parametrize(("devices", "as_arrays"), [(8, False), (2, False), (2, True)])
def test_a_state_comes_back_on_any_mesh(devices, as_arrays, tmp_path, opened):
    state, step = make_state(make_mesh(8))
    checkpoints = opened(tmp_path)
    assert checkpoints.restore(state, identity=IDENTITY) is None
    for _ in range(3):
        state = step(state)
    saved = copied(state)
    checkpoints.save(3, state, identity=IDENTITY)
    state = step(state)
    expected = copied(step(state))
    checkpoints.close()

    other, step = make_state(make_mesh(devices))
    like = other if as_arrays else structs(other)
    restored, at = opened(tmp_path).restore(like, identity=IDENTITY)
    assert at == 3
    assert_same(restored, saved)
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == [leaf.sharding for leaf in jax.tree.leaves(other)]
    # And it goes on as the state that was never saved did, the optimiser's part included. Another mesh adds up the
    # gradient's norm in another order.
    assert_same(step(step(restored)), expected, tolerance=0 if devices == 8 else 1e-7)


def test_arrays_may_be_donated_while_they_are_written(tmp_path, opened):
    values = np.random.default_rng(0).standard_normal((1500, 1500), np.float32)
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {name: jax.device_put(values) for name in "ab"}
    checkpoints = opened(tmp_path)
    for step in (1, 2, 3):
        saved = copied(state)
        checkpoints.save(step, state, identity={})
        for _ in range(5):
            state = add(state)
        checkpoints.wait()
        assert_same(checkpoints.restore(state, identity={})[0], saved)


def test_keeps_the_newest(tmp_path, opened):
    checkpoints = opened(tmp_path, keep=2)
    for step in (1, 2, 5, 9):
        checkpoints.save(step, small(step), identity={})
    checkpoints.wait()
    assert steps_in(tmp_path) == ["5", "9"]
    state, step = checkpoints.restore(small(), identity={})
    assert step == 9
    assert_same(state, copied(small(9)))


def test_due(tmp_path, opened):
    checkpoints = opened(tmp_path, every=5)
    assert [step for step in range(1, 12) if checkpoints.due(step)] == [5, 10]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora": {"rank": 8}}, r"lora was null and is now not set; lora\.rank was not set and is now 8"),
        (
            {"optimizer": {"learning_rate": 0.2, "betas": (0.9, 0.99)}},
            r"optimizer\.learning_rate was 0\.1 and is now 0\.2",
        ),
        ({"data": {"sha256": "cd"}}, r'data\.sha256 was "ab" and is now "cd"'),
        ({"more": 1}, "more was not set and is now 1"),
    ],
)
def test_another_run_is_refused(changed, said, tmp_path, opened):
    checkpoints = opened(tmp_path)
    checkpoints.save(4, small(4), identity=IDENTITY)
    checkpoints.wait()
    with pytest.raises(ValueError, match=rf"/4 was saved by another run: {said}; choose another output folder"):
        checkpoints.restore(small(), identity={**IDENTITY, **changed})
    assert checkpoints.restore(small(), identity=IDENTITY)[1] == 4


def test_another_state_is_refused(tmp_path, opened):
    checkpoints = opened(tmp_path)
    checkpoints.save(4, small(4), identity={})
    checkpoints.wait()
    wrong = jax.device_put({"weights": {"a": jnp.zeros(5), "b": jnp.zeros(2)}})
    with pytest.raises(ValueError, match="another state than this run's; choose another output folder") as refusal:
        checkpoints.restore(wrong, identity={})
    assert str(refusal.value).splitlines()[1:] == [
        "  unexpected step ()",
        "  weights/a is float32 (4,) instead of float32 (5,)",
        "  missing weights/b (2,)",
    ]
    with pytest.raises(ValueError, match=r"step is int32 \(\) instead of float32 \(\)"):
        checkpoints.restore({**small(), "step": jnp.float32(0)}, identity={})


@pytest.mark.parametrize("part", [module.STATE, module.IDENTITY])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_still_there(part, tmp_path, opened):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, small(step), identity={})
    checkpoints.close()
    for file in (tmp_path / "2" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    checkpoints = opened(tmp_path)
    with pytest.raises(
        ValueError, match="/2: this checkpoint cannot be read; delete it to continue from the one before"
    ):
        checkpoints.restore(small(), identity={})
    checkpoints.close()
    shutil.rmtree(tmp_path / "2")
    assert opened(tmp_path).restore(small(), identity={})[1] == 1


def test_leftovers_are_ignored_and_removed(tmp_path, opened):
    checkpoints = opened(tmp_path)
    checkpoints.save(1, small(1), identity={})
    checkpoints.close()
    # What a writer killed in a save, and one killed while it made room, leave.
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "1" / module.IDENTITY, tmp_path / module.DISCARDED / "0" / module.IDENTITY)
    checkpoints = opened(tmp_path)
    assert checkpoints.restore(small(), identity={})[1] == 1
    checkpoints.save(2, small(2), identity={})
    checkpoints.wait()
    assert steps_in(tmp_path) == ["1", "2"]


def test_one_run_at_a_time(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    first = opened(tmp_path)
    with pytest.raises(ValueError, match="another process is training into it; wait for it to end or choose another"):
        Checkpoints(tmp_path, keep=1, every=1)
    first.close()
    opened(tmp_path)


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"every": 0}])
def test_bad_numbers_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"= 0, but it must be at least 1"):
        Checkpoints(tmp_path, **{"keep": 1, "every": 1, **wrong})


def test_a_failed_save_is_raised_and_leaves_the_one_before(tmp_path, opened, monkeypatch):
    checkpoints = opened(tmp_path)
    checkpoints.save(1, small(1), identity={})
    checkpoints.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        patched.setattr(os, "replace", full)
        checkpoints.save(2, small(2), identity={})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    assert checkpoints.restore(small(), identity={})[1] == 1
    checkpoints.close()
    assert opened(tmp_path).restore(small(), identity={})[1] == 1


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow(seconds=20))])
def test_a_writer_killed_in_a_save_leaves_the_last_whole_one(tmp_path, opened, kills):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    like = {"step": jnp.int32(0), "weights": jnp.zeros((1000, 1000))}
    rng = np.random.default_rng(0)
    done = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(done + 1)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        begun = finished = done
        with process, process.stdout as lines:
            for line in lines:
                word, number = line.split()
                begun, finished = (int(number), finished) if word == "saving" else (begun, int(number))
                if begun > done + 3:
                    break
            # Anywhere in a save: it takes about a tenth of a second.
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            for line in lines:
                word, number = line.split()
                begun, finished = (int(number), finished) if word == "saving" else (begun, int(number))
        assert begun > done + 3
        checkpoints = opened(tmp_path, keep=3)
        state, done = checkpoints.restore(like, identity={"run": 1})
        checkpoints.close()
        assert finished <= done <= begun
        assert state["step"] == done
        expected = np.random.default_rng(done).standard_normal((1000, 1000), np.float32)
        np.testing.assert_array_equal(np.asarray(state["weights"]), expected)
    # Nor is there a broken one before it.
    older = [path for path in tmp_path.iterdir() if path.name.isdecimal() and path.name != str(done)]
    assert older
    shutil.rmtree(tmp_path / str(done))
    state, step = opened(tmp_path).restore(like, identity={"run": 1})
    expected = np.random.default_rng(step).standard_normal((1000, 1000), np.float32)
    np.testing.assert_array_equal(np.asarray(state["weights"]), expected)

"""Loss, gradients and optimiser steps: against torch, and against themselves over meshes, micro-batches and packing."""

import copy
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from judge import assert_as_close_as_the_reference, relative_error
from prompts import forward_inputs
from train_rows import EXAMPLES, SHORT, examples, pack, shallow

from qwen2audio_jax.checkpoint.mapping import canonical_name, expected_tensors
from qwen2audio_jax.model.qwen2_audio import parameter_axes, sharded_specs
from qwen2audio_jax.parallel.sharding import make_mesh, named_sharding
from qwen2audio_jax.train import parts
from qwen2audio_jax.train.losses import sft_sums
from qwen2audio_jax.train.optimizer import learning_rate, make_optimizer
from qwen2audio_jax.train.settings import PARTS, OptimizerSettings
from qwen2audio_jax.train.state import new_state, state_shardings, weight_shardings
from qwen2audio_jax.train.step import gradients, make_step

ALONE = [[i] for i in range(len(EXAMPLES))]
PACKED = [[3], [1, 0], [2, 4, 6], [5, 7], [], [], [], []]


def sums_of(cfg, remat="none"):
    return lambda weights, frozen, batch, key: sft_sums(parts.join(weights, frozen), batch, cfg=cfg, remat=remat)


def batch_for(name, groups=ALONE, *, seed=0):
    inputs, labels = examples(name, SHORT, seed=seed)
    return pack(inputs, labels, groups, tokens=64, clips=4)


@pytest.fixture(scope="module")
def small(load):
    """One layer of each kind: what is asked of whole steps is asked of them."""
    return shallow(load("gqa"), layers=1)


@pytest.fixture(scope="module")
def small_means(small):
    """Its gradient, and the metrics, of one batch."""
    return means(small, batch_for("gqa"))


def means(model, batch, *, accumulation=1, remat="none", train=PARTS):
    weights, frozen = parts.split(model.params, parts=train)
    compute = jax.jit(
        lambda w, f, b: gradients(
            sums_of(model.config, remat), w, f, b, jax.random.PRNGKey(0), accumulation=accumulation
        )
    )
    return compute(weights, frozen, batch)


def ours_from_torch(model, tensors):
    """Torch tensors by name as a flat dict of our layout."""
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(dict(model.params)).items()}
    targets = expected_tensors(shapes)
    result = {}
    for name, tensor in tensors.items():
        target = targets.get(canonical_name(name))
        if target is not None:
            result[target.parameter] = tensor.T if target.transform == "reversed" else tensor
    return result


def flat(tree):
    return flatten_dict(dict(tree), sep="/")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def shallow_reference(model, *, layers):
    """The reference with only the first so many layers of encoder and decoder."""
    model = copy.deepcopy(model)
    parts = model.model
    for part in (parts.audio_tower, parts.language_model):
        part.layers = part.layers[:layers]
    return model


def reference_gradients(torch, inputs, labels):
    """For `judge`: a model's loss and every gradient by its name."""

    def run(model):
        model.requires_grad_(True)
        loss = model(**forward_inputs(inputs), labels=torch.from_numpy(labels)).loss
        loss.backward()
        found = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
        return loss.item(), found

    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("base", marks=pytest.mark.slow(seconds=11)),
        "gqa",
        pytest.param("mels80", marks=pytest.mark.slow(seconds=8)),
    ],
)
def test_loss_and_every_gradient_equal_the_reference(torch, reference, load, name):
    inputs, labels = examples(name)
    model = load(name)
    ours, metrics = means(model, pack(inputs, labels, PACKED, tokens=160, clips=4), remat="layers")
    trained = {path for path in flat(model.params) if path != "encoder/embed_positions/embedding"}
    assert set(flat(ours)) == trained
    run = reference_gradients(torch, inputs, labels)

    def theirs(reference):
        loss, gradients = run(reference)
        gradients = ours_from_torch(model, gradients)
        return loss, {path: gradients[path] for path in trained}

    assert_as_close_as_the_reference((metrics["loss"], flat(ours)), reference(name), theirs)


def test_tied_embeddings_get_both_gradients(torch, reference, load):
    """The oracle holds two equal matrices; the gradient of one shared matrix is the sum of theirs."""
    inputs, labels = examples("tied")
    batch = pack(inputs, labels, PACKED, tokens=160, clips=4)
    ours, metrics = means(load("tied"), batch, train=("encoder", "projector", "decoder"))
    run = reference_gradients(torch, inputs, labels)

    def theirs(reference):
        loss, gradients = run(reference)
        one = [value for key, value in gradients.items() if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
        return loss, sum(one)

    found = metrics["loss"], ours["decoder"]["embed_tokens"]["embedding"]
    assert_as_close_as_the_reference(found, reference("tied"), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow(seconds=6)),
        {"weight_decay": 0.1, "decay": "all", "betas": (0.8, 0.95), "clip_norm": 0.3},
    ],
)
def test_one_adamw_step_equals_torch(torch, reference, small, settings):
    # The published eps of 1e-8 makes a first step of 1 out of any gradient, rounding errors of zero included.
    settings = {"decay": "all", "clip_norm": 0.0, "eps": 1e-3, **settings}
    settings = OptimizerSettings(learning_rate=1e-2, schedule="constant", **settings)
    inputs, labels = examples("gqa", SHORT)
    state, _ = run(small, [batch_for("gqa")], settings=settings)

    def theirs(reference):
        reference.requires_grad_(True)
        trained = [p for key, p in reference.named_parameters() if "embed_positions" not in key]
        optimizer = torch.optim.AdamW(
            trained, lr=1e-2, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        reference(**forward_inputs(inputs), labels=torch.from_numpy(labels)).loss.backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
        tensors = {key: p.detach().numpy() for key, p in reference.named_parameters()}
        weights = ours_from_torch(small, tensors)
        return {path: weights[path] for path in flat(state.weights)}

    assert_as_close_as_the_reference(flat(state.weights), shallow_reference(reference("gqa"), layers=1), theirs)


@pytest.mark.slow(seconds=15)
def test_one_muon_step_orthogonalises_the_matrices_of_the_layers(small, small_means):
    """By the published iteration in float64; all other weights step as with AdamW."""
    options = {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.1, "clip_norm": 0.0, "eps": 1e-3}
    model, (gradient, _) = small, small_means
    state, _ = run(model, [batch_for("gqa")], settings=OptimizerSettings(name="muon", **options))
    adamw = optax.nadamw(1e-2, b2=0.999, eps=1e-3, weight_decay=0.0)
    adamw = adamw.update(gradient, adamw.init(gradient), gradient)[0]
    before, gradient, adamw = flat(model.params), flat(gradient), flat(adamw)
    matrices = 0
    for path, weight in flat(state.weights).items():
        if path.endswith("kernel") and weight.ndim == 2 and "lm_head" not in path and "conv" not in path:
            x = np.asarray(gradient[path], np.float64) * (1 + 0.95 / 1.95)  # Nesterov's first step
            flip = x.shape[0] > x.shape[1]
            x = (x.T if flip else x) / (np.linalg.norm(x) + 1e-3)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
            step = 0.2 * np.sqrt(max(x.shape)) * (x.T if flip else x) + 0.1 * np.asarray(before[path])
            expected, matrices = before[path] - 1e-2 * step, matrices + 1
        else:
            expected = before[path] + adamw[path]
        # The iteration lifts small singular values, and their rounding errors with them, by 3.4^5.
        assert relative_error(np.asarray(weight) - before[path], expected - before[path]) < 1e-3, path
    assert matrices >= 13


def run(model, batches, *, settings=None, mesh=None, fsdp=False, accumulation=1, remat="none", train=PARTS):
    """Losses of a few optimiser steps from the model's weights."""
    settings = settings or OptimizerSettings(learning_rate=3e-3, warmup_steps=2)
    mesh = mesh or make_mesh(data=1, model=1, devices=jax.devices()[:1])
    cfg = model.config
    specs = sharded_specs(cfg, mesh=mesh)
    padded = jax.tree.map(
        lambda leaf, spec: np.pad(leaf, [(0, w - h) for h, w in zip(leaf.shape, spec.shape, strict=True)]),
        dict(model.params),
        specs,
    )
    shardings = weight_shardings(specs, parameter_axes(cfg), mesh=mesh, fsdp=fsdp)
    weights, frozen = parts.split(jax.tree.map(jax.device_put, padded, shardings), parts=train)
    optimizer = make_optimizer(settings, steps=20)
    kept = state_shardings(optimizer, weights, parts.split(shardings, parts=train)[0], mesh=mesh)
    state = new_state(weights, optimizer=optimizer, shardings=kept, seed=0)
    step = make_step(
        sums_of(cfg, remat), optimizer=optimizer, schedule=learning_rate(settings, steps=20), accumulation=accumulation
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(kept, None))
    losses = []
    with jax.set_mesh(mesh):
        for batch in batches:
            batch = jax.tree.map(lambda x: jax.device_put(x, named_sharding(mesh, "batch")), batch)
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def curve(small):
    """The losses of 20 steps on one device, one micro-batch, one example a row."""
    return run(small, [batch_for("gqa", seed=s % 2) for s in range(20)])[1]


@pytest.mark.parametrize(
    ("sizes", "fsdp", "accumulation", "remat"),
    [
        ((4, 2), True, 1, "layers"),
        pytest.param((8, 1), True, 1, "none", marks=pytest.mark.slow(seconds=12)),
        pytest.param((1, 1), False, 4, "none", marks=pytest.mark.slow(seconds=15)),
        pytest.param((2, 4), False, 2, "dots", marks=pytest.mark.slow(seconds=18)),
    ],
)
def test_mesh_and_accumulation_leave_the_curve_as_it_is(small, curve, sizes, fsdp, accumulation, remat):
    mesh = make_mesh(data=sizes[0], model=sizes[1], devices=jax.devices()[: sizes[0] * sizes[1]])
    batches = [batch_for("gqa", seed=s % 2) for s in range(20)]
    _, losses = run(small, batches, mesh=mesh, fsdp=fsdp, accumulation=accumulation, remat=remat)
    assert curve[-1] < curve[0] * 0.9
    np.testing.assert_allclose(losses, curve, rtol=1e-4)


@pytest.mark.slow(seconds=14)
def test_muon_on_a_mesh_leaves_the_curve_as_it_is(small):
    settings = OptimizerSettings(name="muon", learning_rate=3e-3, warmup_steps=2)
    batches = [batch_for("gqa", seed=s % 2) for s in range(8)]
    _, alone = run(small, batches, settings=settings)
    mesh = make_mesh(data=4, model=2, devices=jax.devices()[:8])
    _, losses = run(small, batches, settings=settings, mesh=mesh, fsdp=True, accumulation=2)
    assert alone[-1] < alone[0] * 0.9
    np.testing.assert_allclose(losses, alone, rtol=1e-4)


def test_packing_leaves_the_curve_as_it_is(small, curve):
    _, losses = run(small, [batch_for("gqa", PACKED, seed=s % 2) for s in range(20)])
    np.testing.assert_allclose(losses, curve, rtol=1e-4)


def test_fsdp_splits_weights_and_moments_over_data(small):
    mesh = make_mesh(data=4, model=2, devices=jax.devices()[:8])
    state, _ = run(small, [batch_for("gqa")], mesh=mesh, fsdp=True, remat="layers")
    kernel = state.weights["decoder"]["layers"]["0"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    held = [
        leaf for leaf in jax.tree.leaves(state) if leaf.size > 64 and leaf.addressable_shards[0].data.size == leaf.size
    ]
    assert not held


@pytest.mark.smoke
@pytest.mark.parametrize("train", [("encoder",), ("projector", "head"), ("decoder",)])
def test_only_the_named_parts_change(small, train):
    model = small
    _, frozen = parts.split(model.params, parts=train)
    state, _ = run(model, [batch_for("gqa")] * 2, train=train)
    assert set(flat(state.weights)) | set(flat(frozen)) == set(flat(model.params))
    assert all(part in train for part in {parts.part_of(tuple(path.split("/"))) for path in flat(state.weights)})
    changed = [not np.array_equal(leaf, flat(model.params)[path]) for path, leaf in flat(state.weights).items()]
    assert np.mean(changed) > 0.9


def test_a_part_without_weights_of_its_own_is_refused(load):
    with pytest.raises(ValueError, match=r"head.*embedding table"):
        parts.split(load("tied").params, parts=("head",))
    with pytest.raises(ValueError, match="name at least one of encoder, projector, decoder, head"):
        parts.split(load("tied").params, parts=("ears",))


def test_a_step_that_is_not_finite_changes_nothing(small):
    model = small
    batch = batch_for("gqa")
    broken = replace(batch, features=np.full_like(batch.features, np.nan))
    before, _ = run(model, [batch])
    after, losses = run(model, [batch, broken])
    assert np.isnan(losses[-1])
    for path, leaf in flat(after.weights).items():
        np.testing.assert_array_equal(leaf, flat(before.weights)[path])


def test_bfloat16_compute_keeps_float32_weights_and_comes_close(small, small_means):
    model = small
    half = replace(model.config, dtype="bfloat16")
    weights, frozen = parts.split(model.params, parts=PARTS)
    gradient, metrics = jax.jit(
        lambda w, f, b: gradients(sums_of(half), w, f, b, jax.random.PRNGKey(0), accumulation=1)
    )(weights, frozen, batch_for("gqa"))
    _, expected = small_means
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=2e-2)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(gradient))


def test_fresh_positions_are_sines(small):
    from qwen2audio_jax.model.qwen2_audio import init_params

    table = jax.jit(lambda: init_params(small.config, seed=0))()["encoder"]["embed_positions"]["embedding"]
    half = table.shape[1] // 2
    rates = np.exp(-np.log(10000) / (half - 1) * np.arange(half))
    angles = np.arange(len(table))[:, None] * rates
    np.testing.assert_allclose(table, 0.2 * np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-5)

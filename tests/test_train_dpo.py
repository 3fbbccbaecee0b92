"""DPO against torch, and what the settings make of it and of LoRA: the loss, its gradient, and runs of a few steps."""

import copy
import math
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from hf_layout import write_hf_checkpoint
from judge import assert_as_close_as_the_reference, relative_error
from prompts import forward_inputs, random_inputs
from safetensors.numpy import load_file
from test_train_step import ours_from_torch

from qwen2audio_jax.checkpoint.adapter import save_adapter
from qwen2audio_jax.model.lengths import token_count
from qwen2audio_jax.model.lora import lora_scale, lora_specs, with_adapter
from qwen2audio_jax.parallel.sharding import named_sharding
from qwen2audio_jax.source import resolve_checkpoint
from qwen2audio_jax.train.batch import TrainBatch
from qwen2audio_jax.train.dpo import answer_log_probs, dpo_sums
from qwen2audio_jax.train.objective import REFERENCE
from qwen2audio_jax.train.optimizer import learning_rate, make_optimizer
from qwen2audio_jax.train.settings import (
    DataSettings,
    LoraSettings,
    MachineSettings,
    ObjectiveSettings,
    OptimizerSettings,
    TrainSettings,
    check_settings,
)
from qwen2audio_jax.train.state import new_state, state_shardings
from qwen2audio_jax.train.step import make_evaluation, make_step
from qwen2audio_jax.train.trained_model import load_model

# transformers warns of a property that it has itself renamed when PEFT asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

PROMPTS = ([3, "38", 2], [4], ["29", 2], [1, "57", 2, "3", 1])
"""As in `prompts`; each has a chosen and a rejected answer of so many tokens:"""
ANSWERS = ((2, 5), (4, 1), (3, 3), (1, 2))
CLIPS = [sum(isinstance(part, str) for part in row) for row in PROMPTS]
ALONE, PACKED = [[0], [1], [2], [3]], [[3, 1], [], [2, 0], []]
SPREAD = [[3, 1], [2], [], [0], [], [], [], []]
"""Rows for a mesh of data = 4 and two micro-batches, which then hold different numbers of pairs."""


def preferences(name, *, seed=0):
    """(prompts right-padded; (chosen, rejected) ids of each)."""
    rng = np.random.default_rng(seed + 9)
    answers = [tuple(rng.integers(0, 300, size) for size in sizes) for sizes in ANSWERS]
    return random_inputs(name, rows=PROMPTS, seed=seed, side="right"), answers


def owned(pair):
    """The clips of a prompt."""
    return range(sum(CLIPS[:pair]), sum(CLIPS[: pair + 1]))


def pair_rows(name, groups, *, tokens=61, clips=3, seed=0):
    """A batch whose row r holds the pairs `groups[r]`; the answers of a pair share its clips."""
    inputs, answers = preferences(name, seed=seed)
    frames = inputs["feature_attention_mask"].sum(1)
    features = inputs["input_features"][:, :, :60]
    empty = partial(np.full, (len(groups), tokens))
    ids, targets, segments, positions, slots = (empty(value, np.int32) for value in (0, -100, 0, 0, -1))
    held = np.zeros((len(groups), clips, *features.shape[1:]), np.float32)
    lengths = np.zeros((len(groups), clips), np.int32)
    for row, group in enumerate(groups):
        at = used = 0
        for index, pair in enumerate(group):
            prompt = inputs["input_ids"][pair][inputs["attention_mask"][pair] == 1]
            audio = []
            for clip in owned(pair):
                held[row, used], lengths[row, used] = features[clip], frames[clip]
                audio += range(used * 15, used * 15 + token_count(int(frames[clip])))
                used += 1
            for side, answer in enumerate(answers[pair]):
                whole = np.concatenate([prompt, answer])
                place = slice(at, at + len(whole))
                ids[row, place], positions[row, place] = whole, np.arange(len(whole))
                segments[row, place] = 2 * index + side + 1
                slots[row, place][whole == tiny.AUDIO] = audio
                targets[row, at + len(prompt) - 1 : at + len(whole) - 1] = answer
                at += len(whole)
    return TrainBatch(ids, targets, segments, positions, slots, held, lengths)


@partial(jax.jit, static_argnames="cfg")
def differentiate(params, reference_params, batch, beta, smoothing, *, cfg):
    """((mean loss, sums), gradient) of DPO."""

    def loss(params):
        sums = dpo_sums(params, reference_params, batch, cfg=cfg, beta=beta, label_smoothing=smoothing, remat="layers")
        return sums.loss / sums.count, sums

    return jax.value_and_grad(loss, has_aux=True)(params)


def faded(params):
    """Weights of another model, to be the reference."""
    return jax.tree.map(lambda leaf: 0.9 * leaf, dict(params))


# Against torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def torch_inputs(name):
    """(the reference's batch, chosen and rejected by turns; labels)."""
    inputs, answers = preferences(name)
    rows, labels = [], []
    for pair, both in enumerate(answers):
        prompt = inputs["input_ids"][pair][inputs["attention_mask"][pair] == 1]
        for answer in both:
            rows.append(np.concatenate([prompt, answer]))
            labels.append(np.concatenate([np.full(len(prompt), -100), answer]))
    width = max(map(len, rows))
    clips = [clip for pair in range(len(PROMPTS)) for _ in range(2) for clip in owned(pair)]
    batch = {
        "input_ids": np.stack([np.pad(row, (0, width - len(row)), constant_values=tiny.END_OF_TEXT) for row in rows]),
        "attention_mask": np.stack([np.arange(width) < len(row) for row in rows]).astype(np.int64),
        "input_features": inputs["input_features"][clips],
        "feature_attention_mask": inputs["feature_attention_mask"][clips],
    }
    return batch, np.stack([np.pad(row, (0, width - len(row)), constant_values=-100) for row in labels])


def torch_log_probs(torch, model, name):
    """Log-probabilities of the answers [pairs, 2]."""
    inputs, labels = torch_inputs(name)
    logits = model(**forward_inputs(inputs)).logits[:, :-1].double()
    targets = torch.from_numpy(labels)[:, 1:]
    taken = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (taken * (targets >= 0)).sum(1).reshape(-1, 2)


def torch_dpo(torch, policy, reference, *, beta, smoothing):
    """(mean loss, rewards [pairs, 2]) out of log-probabilities [pairs, 2]."""
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    sigmoid = torch.nn.functional.logsigmoid
    return (-(1 - smoothing) * sigmoid(margin) - smoothing * sigmoid(-margin)).mean(), rewards.detach().numpy()


def summed(loss, rewards, policy):
    """The loss, and sums over the pairs of rewards and the policy's log-probabilities [pairs, 2], in one array.

    Rewards are differences of log-probabilities, and bear their rounding, as does the loss: the range of one array is
    what its errors are relative to.
    """
    accuracy = (rewards[:, 0] > rewards[:, 1]).sum()
    assert 0 < accuracy < len(rewards) == 4
    chosen, rejected = rewards.sum(0, dtype=np.float64)
    log_probs = policy.detach().numpy().sum(0, dtype=np.float64)
    sums = np.array([loss.item(), chosen, rejected, chosen - rejected, *log_probs])
    return {"accuracy": float(accuracy), "sums": sums}


def summed_of(loss, sums, policy):
    """The same of ours; `policy` as `answer_log_probs` returns it."""
    assert float(sums.count) == 4
    extra = {key: float(value) for key, value in sums.extra.items()}
    log_probs = np.asarray(policy, np.float64).sum((0, 1))
    sums = np.array([loss, extra["chosen_reward"], extra["rejected_reward"], extra["margin"], *log_probs])
    return {"accuracy": extra["accuracy"], "sums": sums}


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_every_gradient_equal_the_references(torch, reference, load, smoothing):
    name, beta = "base", 0.3
    model = load(name)
    batch = pair_rows(name, PACKED)
    (loss, sums), found = differentiate(model.params, faded(model.params), batch, beta, smoothing, cfg=model.config)
    found = flatten_dict(found, sep="/")
    del found["encoder/embed_positions/embedding"]  # the reference freezes it

    def theirs(policy):
        policy.requires_grad_(True)
        other = copy.deepcopy(policy)
        other.load_state_dict({key: 0.9 * value for key, value in other.state_dict().items()})
        with torch.no_grad():
            frozen = torch_log_probs(torch, other, name)
        log_probs = torch_log_probs(torch, policy, name)
        loss, rewards = torch_dpo(torch, log_probs, frozen, beta=beta, smoothing=smoothing)
        loss.backward()
        tensors = {key: p.grad.numpy() for key, p in policy.named_parameters() if p.grad is not None}
        gradients = ours_from_torch(model, tensors)
        gradients.pop("encoder/embed_positions/embedding", None)
        return {**summed(loss, rewards, log_probs), "gradients": gradients}

    log_probs = jax.jit(partial(answer_log_probs, cfg=model.config))(model.params, batch)
    ours = {**summed_of(loss, sums, log_probs), "gradients": found}
    assert_as_close_as_the_reference(ours, reference(name), theirs)


def test_with_an_adapter_the_reference_is_the_model_without(torch, reference, load, tmp_path):
    peft = pytest.importorskip("peft")
    name, beta, smoothing = "tied", 0.4, 0.1
    model, settings = load(name), LoraSettings(rank=3, alpha=4.0, targets=("all-linear",))
    rng, specs = np.random.default_rng(2), lora_specs(model.config, settings)
    adapter = jax.tree.map(lambda spec: rng.normal(0, 0.1, spec.shape).astype(np.float32), specs)
    save_adapter(tmp_path / "ours", adapter, settings=settings, config=model.config, base_model="owner/base")

    def mean(adapter, params):
        policy = with_adapter(params, adapter, scale=lora_scale(settings))
        batch = pair_rows(name, ALONE)
        sums = dpo_sums(policy, params, batch, cfg=model.config, beta=beta, label_smoothing=smoothing)
        return sums.loss / sums.count, (sums, answer_log_probs(policy, batch, cfg=model.config))

    (loss, (sums, log_probs)), found = jax.jit(jax.value_and_grad(mean, has_aux=True))(adapter, model.params)

    def theirs(peft_model):
        with torch.no_grad(), peft_model.disable_adapter():
            frozen = torch_log_probs(torch, peft_model, name)
        policy = torch_log_probs(torch, peft_model, name)
        loss, rewards = torch_dpo(torch, policy, frozen, beta=beta, smoothing=smoothing)
        loss.backward()
        # In our layout, by the table of the files' names.
        gradients = {
            key.replace(".default", ""): p.grad.numpy() for key, p in peft_model.named_parameters() if p.requires_grad
        }
        return {**summed(loss, rewards, policy), "gradients": gradients}

    save_adapter(tmp_path / "gradient", found, settings=settings, config=model.config, base_model="")
    gradients = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    ours = {**summed_of(loss, sums, log_probs), "gradients": gradients}
    peft_model = peft.PeftModel.from_pretrained(copy.deepcopy(reference(name)), tmp_path / "ours", is_trainable=True)
    assert_as_close_as_the_reference(ours, peft_model.eval(), theirs)


# Against itself


def test_pairs_in_a_row_equal_pairs_in_rows_of_their_own(load):
    model = load("base")
    (alone, sums), gradient = differentiate(
        model.params, faded(model.params), pair_rows("base", ALONE), 0.3, 0.2, cfg=model.config
    )
    (packed, again), found = differentiate(
        model.params, faded(model.params), pair_rows("base", PACKED), 0.3, 0.2, cfg=model.config
    )
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)
    assert float(again.count) == float(sums.count) == 4
    for name, value in sums.extra.items():
        assert float(again.extra[name]) == pytest.approx(float(value), rel=1e-4), name
    for path, value in flatten_dict(gradient, sep="/").items():
        assert relative_error(flatten_dict(found, sep="/")[path], value) < 1e-4, path


def test_answers_are_told_apart_by_row_and_segment(load):
    model = load("tied")
    compute = jax.jit(partial(answer_log_probs, cfg=model.config))
    alone, packed = compute(model.params, pair_rows("tied", ALONE)), compute(model.params, pair_rows("tied", PACKED))
    assert packed.shape == (4, 30, 2)
    for row, group in enumerate(PACKED):
        for place, pair in enumerate(group):
            np.testing.assert_allclose(packed[row, place], alone[pair, 0], rtol=1e-5)
        assert not packed[row, len(group) :].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_policy_that_is_its_reference_has_a_loss_of_log_2(load, smoothing):
    model = load("base")
    (loss, sums), gradient = differentiate(
        model.params, dict(model.params), pair_rows("base", PACKED), 0.3, smoothing, cfg=model.config
    )
    assert float(loss) == pytest.approx(math.log(2), rel=1e-6)
    assert all(abs(float(value)) < 1e-4 for key, value in sums.extra.items() if key != "accuracy")
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3


# Out of settings


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The checkpoint that runs start from."""
    folder = tmp_path_factory.mktemp("dpo")
    write_hf_checkpoint(folder / "tied", "tied")
    return str(resolve_checkpoint(folder / "tied", cache_dir=folder / "cache"))


DPO = ObjectiveSettings(kind="dpo", beta=0.2, label_smoothing=0.1)
LORA = LoraSettings(rank=3, alpha=6.0, targets=("decoder.q_proj", "down_proj", "fc1"))
ONE = MachineSettings(data=1, model=1, fsdp=False, dtype="float32", remat="none")
MANY = MachineSettings(data=4, model=2, fsdp=True, dtype="float32", remat="none", accumulation=2)


def settings_of(start, **changes):
    optimizer = OptimizerSettings(learning_rate=2e-3, schedule="constant")
    changes = {"machine": ONE, "optimizer": optimizer, "train": ("projector", "decoder"), **changes}
    return TrainSettings(model=start, output="unused", steps=20, data=DataSettings(train=("a.jsonl",)), **changes)


def run(settings, *, steps):
    """(model, last state, losses) of steps that take two batches by turns."""
    model = load_model(settings)
    optimizer = make_optimizer(settings.optimizer, steps=settings.steps)
    kept = state_shardings(optimizer, model.weights, model.shardings, mesh=model.mesh)
    step = make_step(
        model.sums_of,
        optimizer=optimizer,
        schedule=learning_rate(settings.optimizer, steps=settings.steps),
        accumulation=settings.machine.accumulation,
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(kept, None))
    rows = named_sharding(model.mesh, "batch")
    batches = [jax.device_put(pair_rows("tied", SPREAD, seed=seed), rows) for seed in range(2)]
    losses = []
    with jax.set_mesh(model.mesh):
        state = new_state(model.weights, optimizer=optimizer, shardings=kept, seed=settings.seed)
        for n in range(steps):
            state, metrics = step(state, model.frozen, batches[n % 2])
            losses.append(float(metrics["loss"]))
    assert float(metrics["targets"]) == (4 if settings.objective.kind == "dpo" else sum(map(sum, ANSWERS)))
    return model, state, losses


def check_untouched(tree, expected):
    for path, leaf in flatten_dict(dict(tree)).items():
        np.testing.assert_array_equal(leaf, flatten_dict(dict(expected))[path])


def changed(tree, before):
    return np.mean([not np.array_equal(leaf, flatten_dict(before)[path]) for path, leaf in flatten_dict(tree).items()])


@pytest.mark.slow(seconds=11)
def test_dpo_curve_on_one_device_and_over_a_mesh_in_micro_batches(load, start):
    settings = settings_of(start, objective=DPO)
    model, state, losses = run(settings, steps=12)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    before = load("tied").params
    assert set(model.frozen) == {"encoder", REFERENCE}
    check_untouched(model.frozen[REFERENCE], before)
    check_untouched(model.frozen["encoder"], before["encoder"])
    assert changed(state.weights, dict(before)) == 1
    _, _, again = run(replace(settings, machine=MANY), steps=12)
    np.testing.assert_allclose(again, losses, rtol=1e-4)


def test_what_is_not_trained_is_not_copied_for_the_reference(start):
    model = load_model(settings_of(start, objective=DPO, train=("projector",), machine=MANY))
    assert set(model.frozen[REFERENCE]) == {"projector"} == set(model.weights)
    kernel, copied = (tree["projector"]["kernel"] for tree in (model.weights, model.frozen[REFERENCE]))
    assert copied.sharding == kernel.sharding
    assert not kernel.sharding.is_fully_replicated


@pytest.fixture(scope="module")
def lora_run(start):
    return run(settings_of(start, lora=LORA, optimizer=OptimizerSettings(learning_rate=1e-2)), steps=20)


def test_lora_trains_the_adapter_alone(load, lora_run):
    model, state, losses = lora_run
    assert losses[-1] < 0.9 * losses[0]
    check_untouched(model.frozen, load("tied").params)
    shapes = jax.tree.map(lambda leaf: leaf.shape, lora_specs(model.config, LORA))
    assert jax.tree.map(lambda leaf: leaf.shape, state.weights) == shapes
    assert changed(state.weights, model.weights) == 1


@pytest.mark.slow(seconds=10)
def test_mesh_and_micro_batches_leave_the_lora_curve_as_it_is(start, lora_run):
    settings = settings_of(start, lora=LORA, optimizer=OptimizerSettings(learning_rate=1e-2), machine=MANY)
    model, state, losses = run(settings, steps=20)
    np.testing.assert_allclose(losses, lora_run[2], rtol=1e-4)
    pair = state.weights["decoder"]["layers"]["0"]["mlp"]["down_proj"]  # [112, 3], [3, 56]
    assert pair["lora_a"].addressable_shards[0].data.shape == (56, 3)
    assert pair["lora_b"].addressable_shards[0].data.shape == (3, 14)
    kernel = model.frozen["decoder"]["layers"]["0"]["mlp"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


@pytest.mark.slow(seconds=9)
def test_dpo_of_an_adapter_with_dropout_in_bfloat16(load, start):
    """The reference is the same rounded weights: the first margin is 0. What is trained stays float32."""
    settings = settings_of(
        start,
        objective=DPO,
        lora=replace(LORA, dropout=0.2),
        machine=replace(ONE, dtype="bfloat16"),
        optimizer=OptimizerSettings(learning_rate=1e-2),
    )
    model, state, losses = run(settings, steps=20)
    # Policy and reference are two programs: their four log-probabilities of a pair differ by their roundings.
    batch = pair_rows("tied", SPREAD, seed=0)
    wide, narrow = (
        np.asarray(jax.jit(partial(answer_log_probs, cfg=cfg))(load("tied").params, batch))
        for cfg in (load("tied").config, replace(load("tied").config, dtype="bfloat16"))
    )
    rounding = np.abs(narrow - wide).max()
    assert abs(losses[0] - math.log(2)) < DPO.beta / 2 * 4 * rounding < 0.1 * math.log(2)
    assert losses[-1] < 0.8 * losses[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.frozen)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.weights)} == {"float32"}


def test_dropout_is_of_training_alone(start):
    """An evaluation is the same program with a dropout as without."""

    def programs(dropout):
        model = load_model(settings_of(start, lora=replace(LORA, dropout=dropout)))
        arguments = model.weights, model.frozen, pair_rows("tied", ALONE)
        training = jax.make_jaxpr(model.sums_of)(*arguments, jax.random.PRNGKey(0))
        return str(training), str(jax.make_jaxpr(make_evaluation(model.sums_of))(*arguments))

    (training, evaluation), (plain, plain_evaluation) = programs(0.3), programs(0.0)
    assert "random_bits" in training
    assert "random_bits" not in plain
    assert evaluation == plain_evaluation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": ObjectiveSettings(kind="dpo", beta=0.0)}, "objective.beta = 0.0, but it must be above 0"),
        ({"objective": ObjectiveSettings(kind="dpo", beta=-0.1)}, "objective.beta = -0.1"),
        ({"objective": ObjectiveSettings(label_smoothing=0.5)}, "label_smoothing = 0.5, but .* from 0 to below 0.5"),
        ({"objective": ObjectiveSettings(label_smoothing=-0.1)}, "label_smoothing = -0.1"),
        ({"lora": replace(LORA, rank=0)}, "lora.rank = 0, but it must be above 0"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_settings(settings_of("unused", **changes))


def test_an_adapter_of_unknown_layers_is_refused(start):
    with pytest.raises(ValueError, match="'conv1' names no linear layer"):
        load_model(settings_of(start, lora=replace(LORA, targets=("conv1",))))

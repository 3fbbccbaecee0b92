"""Encoder, projector, merge, decoder and loss against the reference's own classes, layer by layer, in float32.

The judge is the reference in float64 (see `judge`); between two programs of ours the bar is 1e-5 of the range.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from judge import assert_as_close, assert_as_close_as_the_reference, in_float64, judge, relative_error
from prompts import RAGGED, as_torch, forward_inputs, random_inputs

from qwen2audio_jax import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.generation.encoding import encode_and_place
from qwen2audio_jax.generation.inputs import check_inputs
from qwen2audio_jax.generation.run import append as jitted_append
from qwen2audio_jax.generation.scoring import score_continuations
from qwen2audio_jax.model import encoder
from qwen2audio_jax.model.binding import bind
from qwen2audio_jax.model.decoder import Decoder
from qwen2audio_jax.model.encoder import Encoder
from qwen2audio_jax.model.kv_cache import empty_cache
from qwen2audio_jax.model.layers import LayerNorm
from qwen2audio_jax.model.lengths import conv_length, token_count
from qwen2audio_jax.model.qwen2_audio import Prompt, append, decode_step, embed, forward

NAMES = tuple(tiny.CONFIGS)
TOLERANCE = 1e-5


def rows_of(name):
    """All four rows; of `base`, whose clips are as long as the published model's, the first two."""
    return RAGGED[:2] if name == "base" else RAGGED


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def encoder_inputs(name):
    inputs = random_inputs(name)
    return inputs["input_features"], inputs["feature_attention_mask"].sum(1)


def reference_encoder_states(torch, reference, features, frames):
    """Input of the first layer, output of every layer, of the tower and of the projector.

    With the key mask that the whole model makes.
    """
    tower = reference.model.audio_tower
    states = []
    hooks = [tower.layers[0].register_forward_pre_hook(lambda m, args: states.append(args[0].detach().numpy()))]
    hooks += [
        layer.register_forward_hook(lambda m, args, out: states.append(out.detach().numpy())) for layer in tower.layers
    ]
    steps = features.shape[-1] // 2
    valid = torch.arange(steps)[None] < torch.from_numpy(conv_length(frames))[:, None]
    dtype = tower.conv1.weight.dtype
    mask = torch.zeros(valid.shape, dtype=dtype).masked_fill(~valid, torch.finfo(dtype).min)
    mask = mask[:, None, None].expand(-1, 1, steps, -1)  # SDPA takes it at the size of the scores
    with torch.no_grad():
        last = tower(torch.from_numpy(features).double(), attention_mask=mask).last_hidden_state
        projected = reference.model.multi_modal_projector(last)
    for hook in hooks:
        hook.remove()
    return states, last.numpy(), projected.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_encoder_layer_by_layer(torch, reference, load, name):
    features, frames = encoder_inputs(name)
    model = load(name)
    config = model.config.audio_config

    @jax.jit
    def ours(params, features, frames):
        encoder = bind(Encoder, config, params)
        x = encoder.embed(features)
        every = [x]
        for layer in encoder.layers:
            every.append(layer(every[-1], lengths=conv_length(frames), attention="xla"))
        return every, encoder.pool(every[-1])

    every, pooled = ours(model.params["encoder"], features, frames)
    heard = model.encode_audio(features, random_inputs(name)["feature_attention_mask"])
    assert heard.lengths.tolist() == [token_count(int(n)) for n in frames]

    def valid(vectors):
        return [vectors[clip, :length] for clip, length in enumerate(heard.lengths)]

    def theirs(reference):
        states, last, projected = reference_encoder_states(torch, reference, features, frames)
        return {"states": states, "last": last, "encoded": valid(last), "projected": valid(projected)}

    found = {"states": every, "last": pooled, "encoded": valid(heard.encoded), "projected": valid(heard.projected)}
    assert_as_close_as_the_reference(found, reference(name), theirs)


@pytest.mark.parametrize("name", ["gqa", "mels80"])
def test_every_even_buffer_with_two_silent_frames_gives_the_same(load, name):
    model = load(name)
    config = model.config.audio_config
    rng = np.random.default_rng(3)

    @jax.jit
    def encode(params, features, frames):
        return bind(Encoder, config, params)(features, frames, attention="xla")

    for frames in (3, 4, 57, 96):
        features = rng.normal(size=(1, config.num_mel_bins, config.max_frames)).astype(np.float32)
        whole = encode(model.params["encoder"], features, np.array([frames]))
        short = encode(model.params["encoder"], features[:, :, : frames + 2 + frames % 2], np.array([frames]))
        count = token_count(frames)
        assert relative_error(short[:, :count], whole[:, :count]) < TOLERANCE


def device_prompt(model, inputs):
    """What the model object makes of a batch, and for each row its place in the left-aligned arrays."""
    clips = inputs.get("input_features"), inputs.get("feature_attention_mask")
    checked = check_inputs(inputs["input_ids"], inputs["attention_mask"], *clips, config=model.config)
    prompt, _ = encode_and_place(model.runtime, checked, checked.sizes)
    return checked.rows, prompt


@pytest.mark.parametrize("name", NAMES)
def test_merged_embeddings(torch, reference, load, name):
    inputs, model = random_inputs(name, rows_of(name)), load(name)
    rows, prompt = device_prompt(model, inputs)

    def theirs(reference):
        seen = []
        hook = reference.model.language_model.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"].detach().numpy()), with_kwargs=True
        )
        with torch.no_grad():
            reference(**as_torch(inputs))
        hook.remove()
        return [seen[0][row, columns] for row, columns in enumerate(rows.columns)]

    merged = embed(model.params, Prompt(prompt.ids, prompt.lengths, prompt.audio, prompt.slots), cfg=model.config)
    ours = [merged[row, : len(columns)] for row, columns in enumerate(rows.columns)]
    assert_as_close_as_the_reference(ours, reference(name), theirs)


def reference_logits(torch, inputs):
    """For `judge`: a model's logits at every token."""
    kept = inputs["attention_mask"].astype(bool)

    def logits(model):
        with torch.no_grad():
            found = model(**forward_inputs(inputs)).logits
        return (found if found.dtype == torch.float64 else found.float()).numpy()[kept]

    return logits


@pytest.fixture(scope="module")
def judged_logits(torch, reference):
    """`judged_logits(name, side)`: the judge on a ragged batch padded on that side."""
    return cache(lambda name, side: judge(reference(name), reference_logits(torch, padded(name, side))))


def padded(name, side):
    return random_inputs(name, RAGGED if side == "left" else rows_of(name), side=side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_ragged_batches(judged_logits, reference, load, name, side):
    inputs = padded(name, side)
    logits = load(name)(**inputs).logits
    kept = inputs["attention_mask"].astype(bool)
    assert logits.shape == (*inputs["input_ids"].shape, tiny.CONFIGS[name]["text_config"]["vocab_size"])
    assert_as_close(logits[kept], judged_logits(name, side))
    assert not np.asarray(logits)[~kept].any()


@pytest.mark.parametrize("fault", [{}, {"rope_theta": 10_010.0}, {"rms_norm_eps": 1e-6}], ids=str)
def test_the_bar_tells_a_small_fault_in_the_decoder(judged_logits, reference, load, fault):
    inputs, model = random_inputs("base"), load("base")
    text = dataclasses.replace(model.config.text_config, **fault)
    config = dataclasses.replace(model.config, text_config=text)
    kept = inputs["attention_mask"].astype(bool)
    logits = Qwen2AudioForConditionalGeneration(config, model.params)(**inputs).logits[kept]
    (exact,), (bar,) = (found.values() for found in judged_logits("base", "left"))
    assert (relative_error(logits, exact) > bar) == bool(fault)


@pytest.fixture(scope="module")
def judged_encoder(torch, reference):
    """The judge on the encoder's output."""
    inputs = encoder_inputs("base")
    return judge(reference("base"), lambda model: reference_encoder_states(torch, model, *inputs)[1])


@pytest.mark.parametrize("fault", ["", "tanh GELU", "layer_norm_eps"])
def test_the_bar_tells_a_small_fault_in_the_encoder(judged_encoder, reference, load, monkeypatch, fault):
    features, frames = encoder_inputs("base")
    model = load("base")
    if fault == "tanh GELU":
        monkeypatch.setattr(encoder, "_gelu", jax.nn.gelu)

    @jax.jit
    def ours(params):
        bound = bind(Encoder, model.config.audio_config, params)
        for _, module in nnx.iter_modules(bound):
            if fault == "layer_norm_eps" and isinstance(module, LayerNorm):
                module.eps = 1e-6
        return bound(features, frames, attention="xla")

    exact, bars = judged_encoder
    assert (relative_error(ours(model.params["encoder"]), exact[""]) > bars[""]) == bool(fault)


@pytest.mark.parametrize("name", NAMES)
def test_decoder_layer_by_layer(torch, reference, load, name):
    """Every layer's output, by cutting the stack after it: same weights, fewer layers."""
    inputs = random_inputs(name, rows=([6, 5], [3]), seed=2)
    model = load(name)
    rows, prompt = device_prompt(model, inputs)

    def valid(hidden):
        return [hidden[row, columns] for row, columns in enumerate(rows.columns)]

    def theirs(reference):
        states = []
        decoder = reference.model.language_model
        hooks = [layer.register_forward_hook(lambda m, args, out: states.append(out)) for layer in decoder.layers]
        with torch.no_grad():
            reference(**forward_inputs(inputs))
            found = [valid(decoder.norm(torch.as_tensor(state)).numpy()) for state in states]
        for hook in hooks:
            hook.remove()
        return found

    ours = []
    for count in range(1, model.config.text_config.num_hidden_layers + 1):
        text = dataclasses.replace(model.config.text_config, num_hidden_layers=count)
        cfg = dataclasses.replace(model.config, text_config=text)
        decoder = dict(model.params["decoder"])
        decoder["layers"] = {str(i): decoder["layers"][str(i)] for i in range(count)}
        # An identity for a head: what comes out is the normalised hidden state.
        head = np.eye(text.hidden_size, text.vocab_size, dtype=np.float32)
        if text.tie_word_embeddings:
            cfg = dataclasses.replace(cfg, text_config=dataclasses.replace(text, tie_word_embeddings=False))
        decoder["lm_head"] = {"kernel": jnp.asarray(head)}
        hidden = forward({**model.params, "decoder": decoder}, prompt, cfg=cfg)[..., : text.hidden_size]
        ours.append([hidden[row, : len(columns)] for row, columns in enumerate(rows.columns)])
    assert_as_close_as_the_reference(ours, reference(name), theirs)


def reference_loss(torch, inputs, labels):
    """For `judge`: a model's loss."""

    def loss(model):
        with torch.no_grad():
            return model(**forward_inputs(inputs), labels=torch.from_numpy(labels)).loss.double().numpy()

    return loss


@pytest.mark.parametrize("name", NAMES)
def test_loss(torch, reference, load, name):
    inputs = random_inputs(name, rows_of(name), side="right")
    rng = np.random.default_rng(5)
    labels = np.where(rng.random(inputs["input_ids"].shape) < 0.6, inputs["input_ids"], -100)
    labels[inputs["attention_mask"] == 0] = -100
    ours = load(name)(**inputs, labels=labels).loss
    assert_as_close_as_the_reference(ours, reference(name), reference_loss(torch, inputs, labels))


def test_loss_of_left_padded_rows_leaves_out_what_padding_would_predict(torch, reference, load):
    inputs = random_inputs("gqa", rows=([7], [12]))
    labels = np.where(inputs["attention_mask"], inputs["input_ids"], -100)
    ours = load("gqa")(**inputs, labels=labels).loss
    labels[0, 5] = -100  # the first token of the padded row
    assert_as_close_as_the_reference(ours, reference("gqa"), reference_loss(torch, inputs, labels))


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_equal_the_full_forward(load, name):
    """Append a prompt in two parts and then token by token: the logits are those of the whole row at once."""
    model = load(name)
    cfg = model.config
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 300, (2, 24)).astype(np.int32)
    lengths = np.array([24, 17], np.int32)
    full = jax.jit(forward, static_argnames="cfg")(model.params, Prompt(ids, jnp.asarray(lengths), None, None), cfg=cfg)
    cache = empty_cache(cfg.text_config, rows=2, capacity=40, dtype=jnp.float32)
    first = np.array([9, 4], np.int32)

    def embedded(ids):
        return embed(model.params, Prompt(jnp.asarray(ids), jnp.zeros(2, jnp.int32), None, None), cfg=cfg)

    logits, cache = jitted_append(
        model.params, embedded(ids[:, :9]), cache, counts=jnp.asarray(first), cfg=cfg, window=9
    )
    for row in range(2):
        assert relative_error(logits[row], full[row, first[row] - 1]) < TOLERANCE
    second = np.stack([ids[row, first[row] : first[row] + 8] for row in range(2)])
    logits, cache = append(model.params, embedded(second), cache, counts=jnp.array([8, 8]), cfg=cfg, window=20)
    step = jax.jit(decode_step, static_argnames="cfg")
    for position in range(5):
        at = first + 8 + position
        for row in range(2):
            assert relative_error(logits[row], full[row, at[row] - 1]) < TOLERANCE
        logits, cache = step(model.params, jnp.asarray(ids[np.arange(2), at]), cache, cfg=cfg)
    assert cache.lengths.tolist() == (first + 13).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_to_float32_as_the_reference(torch, reference, hf_checkpoint, tmp_path, dtype):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(hf_checkpoint("gqa"), dtype=dtype, cache_dir=tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {dtype}
    inputs = random_inputs("gqa", side="right")
    kept = inputs["attention_mask"].astype(bool)
    logits = model(**inputs).logits[kept]
    assert_as_close_as_the_reference(logits, reference("gqa"), reference_logits(torch, inputs), dtype=dtype)


def test_a_step_in_bfloat16_adds_up_in_float32(load):
    """Of a sum a hundred times as large as what layers add to it, bfloat16 would lose most of that."""
    model = load("gqa")
    cfg, dtype = model.config.text_config, jnp.bfloat16
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), dict(model.params["decoder"]))
    exact_weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    weights["norm"] = exact_weights["norm"]  # so that the result is not rounded
    embeddings = jnp.asarray(100 * np.random.default_rng(0).normal(size=(5, 2, cfg.hidden_size)), dtype)

    def first_hidden(weights, x):
        rows, tokens, _ = x.shape
        cache = empty_cache(cfg, rows=rows, capacity=tokens, dtype=x.dtype)
        counts = jnp.full(rows, tokens, jnp.int32)
        decoder = bind(Decoder, cfg, weights)
        return decoder(x, cache=cache, counts=counts, window=None, attention="xla")[0][:, 0]

    exact = first_hidden(exact_weights, embeddings[:, :1].astype(jnp.float32))
    step = relative_error(first_hidden(weights, embeddings[:, :1]), exact)
    prompt = relative_error(first_hidden(weights, embeddings), exact)
    assert step < prompt / 4, (step, prompt)


def test_continuations_are_as_probable_as_the_reference_says(load, reference, torch):
    model, theirs = load("gqa"), in_float64(reference("gqa"))
    rng = np.random.default_rng(0)
    audio = 25
    ids = np.concatenate([[304], np.full(audio, 303), [305], rng.integers(0, 256, 6)]).astype(np.int32)
    features = rng.standard_normal((1, 128, 300)).astype(np.float32)
    mask = (np.arange(300) < 100)[None].astype(np.int32)
    inputs = {"input_ids": ids[None], "input_features": features, "feature_attention_mask": mask}
    continuations = [list(map(int, rng.integers(0, 256, size))) for size in (1, 3, 7, 2)]
    found = score_continuations(model.runtime, inputs, continuations)
    for continuation, ours in zip(continuations, found, strict=True):
        row = torch.from_numpy(np.concatenate([ids, continuation])[None].astype(np.int64))
        with torch.no_grad():
            logits = theirs(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                input_features=torch.from_numpy(features).double(),
                feature_attention_mask=torch.from_numpy(mask.astype(np.int64)),
            ).logits
        known = torch.log_softmax(logits[0], dim=-1)
        wanted = known[np.arange(len(ids) - 1, row.shape[1] - 1), continuation].numpy()
        assert relative_error(ours, wanted) < TOLERANCE
    with pytest.raises(ValueError, match="at least one token"):
        score_continuations(model.runtime, inputs, [[]])

"""The sampler against the reference's logits processors, and its independence of everything beside the row."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2audio_jax.generation import sampler_state, sampling, sampling_params
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.parallel.sharding import make_mesh, named_sharding

EOS = (302, 300)
POSITIONS = 400


def params_of(vocab_size=320, **options):
    return sampling_params.sampling_params(GenerationConfig(eos_token_id=EOS, **options), vocab_size=vocab_size)


@partial(jax.jit, static_argnames="count")
def distribution(logits, state, params, count):
    """[B, V] probabilities: the candidates scattered to their ids."""
    ids, log_probs = sampling.candidates(sampling.process_logits(logits, state, params), params, count=count)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros(logits.shape).at[rows, ids].add(jnp.exp(log_probs))


candidates = jax.jit(sampling.candidates, static_argnames="count")
step = jax.jit(sampling.next_token, static_argnames="mode")
process = jax.jit(sampling.process_logits)


def start(prompt, *, mask=None, seeds=0, vocab_size=320):
    prompt = np.asarray(prompt, np.int32)
    mask = np.ones_like(prompt) if mask is None else np.asarray(mask)
    seeds = sampling_params.row_seeds(seeds, rows=len(prompt))
    return sampler_state.init_state(unpadded(prompt, mask), seeds, vocab_size=vocab_size, positions=POSITIONS)


def unpadded(prompt, mask):
    return [row[kept != 0] for row, kept in zip(prompt, mask, strict=True)]


def reference_scores(config, prompt, mask, logits, *, new_tokens):
    """What the reference makes of the logits, with the processors that its own `generate` would build."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.generation import utils

    settings = transformers.GenerationConfig(**config.to_dict())
    settings._eos_token_tensor = torch.tensor(config.eos_token_id)
    owner = utils.GenerationMixin()
    owner.config = transformers.Qwen2Config()
    processors = owner._get_logits_processor(
        settings,
        input_ids_seq_length=prompt.shape[1] - new_tokens,
        device="cpu",
        model_kwargs={"attention_mask": torch.tensor(mask)},
    )
    return processors(torch.tensor(prompt), torch.tensor(logits)).numpy()


def reference_probabilities(*args, **kwargs):
    import torch

    return torch.tensor(reference_scores(*args, **kwargs)).softmax(-1).numpy()


SETTINGS = {
    "plain": {"top_k": 0},
    "published": {"temperature": 0.7, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.1},
    "hot": {"temperature": 2.5, "top_k": 0, "top_p": 0.95, "repetition_penalty": 2.0},
    "cold": {"temperature": 0.05, "top_k": 50, "top_p": 0.99},
    "reward": {"temperature": 1.3, "top_k": 7, "repetition_penalty": 0.5},
    "one": {"top_k": 1},
    "tiny nucleus": {"top_k": 0, "top_p": 1e-6},
    "all but the last": {"top_k": 0, "top_p": 0.999},
    "more than there are": {"top_k": 5000, "top_p": 0.9},
    "minimum": {"top_k": 40, "top_p": 0.8, "min_new_tokens": 3},
    "min p": {"top_k": 0, "min_p": 0.05},
    "min p after the others": {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.2},
    "min p of one": {"top_k": 0, "min_p": 1.0},
    "minimum reached": {"top_k": 40, "top_p": 0.8, "min_new_tokens": 2},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_distribution_is_the_reference_s(options):
    pytest.importorskip("transformers")
    config = GenerationConfig(do_sample=True, eos_token_id=EOS, pad_token_id=300, **options)
    new_tokens, vocab_size = 2, 320
    params = sampling_params.sampling_params(config, vocab_size=vocab_size)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, 300, (3, 9 + new_tokens))
        mask = np.ones_like(prompt)
        mask[1, :4] = 0
        prompt[1, :4] = 300
        logits = (rng.standard_normal((3, vocab_size)) * (1 + seed)).astype(np.float32)
        logits[0, 300:303] += 5
        logits[2, rng.integers(0, vocab_size, 30)] = -np.inf
        state = sampler_state.init_state(
            unpadded(prompt, mask), np.arange(3), vocab_size=vocab_size, positions=POSITIONS
        )
        state = replace(state, step=state.step + new_tokens)
        expected = reference_probabilities(config, prompt, mask, logits, new_tokens=new_tokens)
        for count in {vocab_size, min(vocab_size, params.candidate_count or vocab_size)}:
            actual = np.asarray(distribution(jnp.asarray(logits), state, params, count))
            np.testing.assert_array_equal(actual > 1e-6, expected > 1e-6)
            np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"top_k": 10}, {"top_k": 0, "top_p": 0.5}, {"top_k": 25, "top_p": 0.7}])
def test_distribution_with_ties_is_the_reference_s(options):
    """Logits on a coarse grid: all ties of the k-th are kept, and top-p keeps as many of a tie as the reference."""
    pytest.importorskip("transformers")
    config = GenerationConfig(do_sample=True, eos_token_id=EOS, **options)
    params = sampling_params.sampling_params(config, vocab_size=320)
    prompt = np.zeros((4, 3), np.int64)
    for seed in range(8):
        logits = (np.random.default_rng(seed).integers(-12, 12, (4, 320)) / 4).astype(np.float32)
        expected = reference_probabilities(config, prompt, np.ones_like(prompt), logits, new_tokens=0)
        actual = np.asarray(distribution(jnp.asarray(logits), start(prompt), params, 320))
        # Which of the equals at the edge of the nucleus stay is up to the reference's unstable sort.
        np.testing.assert_allclose(np.sort(actual), np.sort(expected), atol=1e-6, rtol=0)
        if "top_p" not in options:
            np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=0)
            assert ((actual > 0).sum(-1) > options["top_k"]).any()


def test_top_p_removes_a_sum_that_equals_the_rest():
    logits = jnp.zeros((1, 4))
    state = start([[3]], vocab_size=4)
    for top_p, kept in ((0.5, 2), (0.51, 3), (0.25, 1), (1.0, 4)):
        config = GenerationConfig(do_sample=True, top_k=0, top_p=top_p)
        probabilities = distribution(logits, state, sampling_params.sampling_params(config, vocab_size=4), 4)
        np.testing.assert_allclose(probabilities[0], [1 / kept] * kept + [0] * (4 - kept), atol=1e-6)


def test_of_ties_beyond_the_candidates_the_lowest_ids_are_drawn():
    """More tokens tied with the k-th than are selected: 128 of them are left, the likelier one is still likelier."""
    params = params_of(do_sample=True, top_k=20)
    assert params.candidate_count == 128
    logits = jnp.zeros((256, 320)).at[:, 305].set(4.0)
    tokens = np.asarray(step(logits, start(np.zeros((256, 1)), seeds=0), params, mode="sample").tokens)
    assert set(tokens) <= {*range(127), 305}
    assert 50 < (tokens == 305).sum() < 110  # e^4 / (e^4 + 127) of 256 is 77


def test_greedy_is_the_reference_s():
    pytest.importorskip("transformers")
    config = GenerationConfig(repetition_penalty=1.1, min_new_tokens=1, eos_token_id=EOS)
    params = sampling_params.sampling_params(config, vocab_size=320)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, 300, (5, 40))
        logits = rng.standard_normal((5, 320)).astype(np.float32)
        logits[:, 302] = 9
        expected = reference_scores(config, prompt, np.ones_like(prompt), logits, new_tokens=0)
        state = start(prompt)
        np.testing.assert_array_equal(sampling.process_logits(jnp.asarray(logits), state, params), expected)
        result = step(jnp.asarray(logits), state, params, mode="greedy")
        np.testing.assert_array_equal(result.tokens, expected.argmax(-1))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30])
def test_repeated_n_grams_are_the_reference_s(size):
    pytest.importorskip("transformers")
    config = GenerationConfig(no_repeat_ngram_size=size, repetition_penalty=1.1, eos_token_id=EOS)
    params = params_of(no_repeat_ngram_size=size, repetition_penalty=1.1)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(0, 3, (4, 21))  # so few ids that n-grams repeat
        prompt[3, -4:] = prompt[3, :4]
        logits = rng.standard_normal((4, 320)).astype(np.float32)
        expected = reference_scores(config, prompt, np.ones_like(prompt), logits, new_tokens=0)
        actual = np.asarray(process(jnp.asarray(logits), start(prompt), params))
        np.testing.assert_array_equal(actual, expected)
        assert np.isneginf(actual).any() == (size < 30)


def test_rows_with_and_without_repeated_n_grams_go_together():
    """Each row's size is its own, its padding counts for nothing, and generated tokens count like the prompt's."""
    configs = [GenerationConfig(no_repeat_ngram_size=size) for size in (0, 2, 3)]
    params = sampling_params.row_params(configs, rows=4, stops=1, vocab_size=320)
    prompt = np.array([[7, 8, 9, 7], [7, 8, 9, 7], [8, 9, 7, 8], [1, 1, 1, 1]])
    logits = jnp.zeros((4, 320)).at[:, 8].set(5.0).at[:, 9].set(4.0)
    first = step(logits, start(prompt), params, mode="greedy")
    assert first.tokens.tolist() == [8, 9, 8, 8]  # row 1 has had 7 8, row 2 no three of them twice
    second = step(logits, first.state, params, mode="greedy")
    assert second.tokens.tolist() == [8, 8, 8, 8]
    third = step(logits, second.state, params, mode="greedy")
    assert third.tokens.tolist() == [8, 8, 9, 8]  # row 2 has had 8 8 8, and not 8 8 9
    assert step(logits, third.state, params, mode="greedy").tokens.tolist()[:2] == [8, 0]  # both 8 8 and 8 9 have been
    assert third.state.length.tolist() == [7, 7, 7, 7]
    assert third.state.ids[2, :8].tolist() == [8, 9, 7, 8, 8, 8, 9, -1]


def test_greedy_takes_the_lowest_of_equals():
    logits = jnp.zeros((1, 320)).at[0, jnp.array([70, 17, 200])].set(2.0)
    assert step(logits, start([[1]]), params_of(), mode="greedy").tokens.tolist() == [17]


def test_padding_is_not_seen():
    state = start([[300, 300, 5, 6], [7, 8, 300, 9]], mask=[[0, 0, 1, 1], [1, 1, 1, 0]])
    assert [np.flatnonzero(row).tolist() for row in np.asarray(state.seen)] == [[5, 6], [7, 8, 300]]


def test_generated_tokens_are_seen_and_penalised():
    logits = jnp.zeros((1, 320)).at[0, 11].set(2.0).at[0, 12].set(1.5)
    params = params_of(repetition_penalty=2.0)
    state, tokens = start([[1]]), []
    for _ in range(3):
        token, _, state = step(logits, state, params, mode="greedy")
        tokens.append(int(token[0]))
    assert tokens == [11, 12, 11]  # 2.0; then 1.0 against 1.5; then 1.0 against 0.75
    assert state.step.tolist() == [3]


def test_finished_rows_emit_padding():
    logits = jnp.zeros((2, 320)).at[0, 302].set(5.0).at[1, 9].set(5.0)
    params = params_of(pad_token_id=301)
    first = step(logits, start([[1], [1]]), params, mode="greedy")
    assert first.tokens.tolist() == [302, 9]
    assert first.state.finished.tolist() == [True, False]
    second = step(logits, first.state, params, mode="greedy")
    assert second.tokens.tolist() == [301, 9]
    assert second.state.finished.tolist() == [True, False]
    assert second.state.step.tolist() == [1, 2]
    assert float(second.log_probs[0]) == 0.0
    assert not second.state.seen[0, 301]


def test_no_stop_id_before_the_minimum():
    logits = jnp.zeros((1, 320)).at[0, 302].set(50.0).at[0, 300].set(40.0)
    params = params_of(min_new_tokens=2, do_sample=True)
    state, tokens = start([[1]]), []
    for _ in range(3):
        token, _, state = step(logits, state, params, mode="sample")
        tokens.append(int(token[0]))
    assert tokens[0] not in EOS
    assert tokens[1] not in EOS
    assert tokens[2] == 302


def test_log_prob_is_the_model_s_own():
    logits = jax.random.normal(jax.random.key(0), (4, 320)) * 3
    params = params_of(do_sample=True, temperature=0.3, top_k=3, repetition_penalty=1.7)
    result = step(logits, start(np.arange(320)[None].repeat(4, 0)), params, mode="sample")
    expected = jax.nn.log_softmax(logits)[jnp.arange(4), result.tokens]
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-5)


@pytest.mark.slow(seconds=6)
def test_frequencies():
    """Pearson's chi-square of 20,000 draws, far inside what a right sampler gives (19 degrees of freedom)."""
    rows, params = 20_000, params_of(do_sample=True, temperature=1.5, top_k=20)
    logits = jnp.linspace(0.0, 6.0, 320)[::-1][None]
    state = start(np.full((1, 1), 319))
    expected = np.asarray(distribution(logits, state, params, 128))[0]
    ids, log_probs = candidates(logits, params, count=128)
    tokens = sampling.draw(
        jnp.repeat(ids, rows, 0), jnp.repeat(log_probs, rows, 0), jnp.arange(rows, dtype=jnp.uint32), jnp.zeros(rows)
    )
    counts = np.bincount(np.asarray(tokens), minlength=320)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert kept.sum() == 20
    chi_square = ((counts[kept] - rows * expected[kept]) ** 2 / (rows * expected[kept])).sum()
    assert 5 < chi_square < 43.8  # 99.9 %


def test_steps_of_one_seed_are_independent():
    logits = jnp.zeros((1, 2))
    state, params = start([[0]], vocab_size=2), sampling_params.sampling_params(GenerationConfig(top_k=0), vocab_size=2)
    tokens = []
    for _ in range(200):
        token, _, state = step(logits, state, params, mode="sample")
        tokens.append(int(token[0]))
    assert 70 < sum(tokens) < 130
    assert 70 < sum(a == b for a, b in pairwise(tokens)) < 130


def generated(logits, prompt, seeds, params, *, steps=12):
    """[B, steps]: the same logits at each step, shifted a little so that steps differ."""
    state = start(prompt, seeds=seeds, vocab_size=logits.shape[-1])
    tokens = []
    for shift in range(steps):
        token, _, state = step(logits * (1 + shift / 10), state, params, mode="sample")
        tokens.append(np.asarray(token))
    return np.stack(tokens, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 20, "top_p": 0.8},
        pytest.param({"top_k": 0, "top_p": 0.9}, marks=pytest.mark.slow(seconds=7)),
        {"top_k": 0},
    ],
)
def test_a_row_is_the_same_alone_reordered_and_padded(options):
    params = params_of(do_sample=True, repetition_penalty=1.1, **options)
    logits = jax.random.normal(jax.random.key(1), (6, 320)) * 2
    prompt, seeds = np.arange(24).reshape(6, 4), [11, 12, 13, 14, 15, 2**32 - 1]
    together = generated(logits, prompt, seeds, params)
    assert len({tuple(row) for row in together}) == 6
    for row in range(6):
        alone = generated(logits[row : row + 1], prompt[row : row + 1], seeds[row : row + 1], params)
        np.testing.assert_array_equal(alone[0], together[row])
    order = np.array([3, 0, 5, 1, 4, 2])
    shuffled = generated(logits[order], prompt[order], [seeds[row] for row in order], params)
    np.testing.assert_array_equal(shuffled, together[order])
    for padding in (1, 57, 192):
        padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        np.testing.assert_array_equal(generated(padded, prompt, seeds, params), together)


@pytest.mark.parametrize("options", [{"top_k": 0, "top_p": 0.9}, {"top_k": 20, "top_p": 0.9}])
def test_padding_the_vocabulary_changes_no_bit(options):
    params = params_of(do_sample=True, **options)
    logits = jax.random.normal(jax.random.key(2), (3, 320)) * 2
    ids, log_probs = candidates(logits, params, count=320)
    for padding in (3, 64, 200):
        padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        more_ids, more = candidates(padded, params, count=320 + padding)
        np.testing.assert_array_equal(more_ids[:, :320], ids)
        np.testing.assert_array_equal(more[:, :320], log_probs)
        assert (more[:, 320:] == -jnp.inf).all()


def test_other_values_do_not_compile_again():
    traces = []

    @partial(jax.jit, static_argnames="mode")
    def counted(logits, state, params, mode):
        traces.append(mode)
        return sampling.next_token(logits, state, params, mode=mode)

    logits = jax.random.normal(jax.random.key(3), (2, 320))
    for options in (
        {"temperature": 0.7, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.1},
        {"temperature": 1.7, "top_k": 50, "top_p": 1.0, "min_new_tokens": 4},
        {"top_k": 1, "pad_token_id": 7},
    ):
        for seed in (1, 2):
            counted(logits, start([[1], [2]], seeds=seed), params_of(do_sample=True, **options), mode="sample")
    config = GenerationConfig(do_sample=True, eos_token_id=(1, 2, 3, 4, 5))
    counted(logits, start([[1], [2]]), sampling_params.sampling_params(config, vocab_size=320), mode="sample")
    assert traces == ["sample"]


@pytest.mark.parametrize("shape", [(1, 8), (4, 2), (2, 4)])
@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_sharded_logits_give_the_same_tokens(shape, mode):
    mesh = make_mesh(data=shape[0], model=shape[1])
    spec, rows = named_sharding(mesh, "batch", "vocab"), named_sharding(mesh, "batch")
    logits = jax.random.normal(jax.random.key(4), (8, 320)) * 2
    state = start(np.arange(32).reshape(8, 4), seeds=3)
    more = {"top_k": 0, "min_p": 0.02, "no_repeat_ngram_size": 1}
    for options in ({"top_k": 20, "top_p": 0.7}, {"top_k": 0, "top_p": 0.9}, more):
        params = params_of(do_sample=True, repetition_penalty=1.1, **options)
        expected = step(logits, state, params, mode=mode)
        placed = jax.device_put(state, sampler_state.SamplerState(spec, rows, rows, rows, rows, rows))
        with jax.set_mesh(mesh):
            result = step(jax.device_put(logits, spec), placed, params, mode=mode)
        np.testing.assert_array_equal(result.tokens, expected.tokens)
        np.testing.assert_allclose(result.log_probs, expected.log_probs, atol=1e-5)
        np.testing.assert_array_equal(result.state.seen, expected.state.seen)


def test_logits_that_are_not_numbers_show_in_the_log_prob():
    logits = jnp.zeros((2, 320)).at[0, 4].set(jnp.nan)
    for mode in ("greedy", "sample"):
        result = step(logits, start([[1], [1]]), params_of(do_sample=True), mode=mode)
        assert np.isnan(result.log_probs).tolist() == [True, False]
        assert ((result.tokens >= 0) & (result.tokens < 320)).all()


def test_row_seeds():
    assert sampling_params.row_seeds(7, rows=3).tolist() == [7, 8, 9]
    assert sampling_params.row_seeds([4, 4, 1], rows=3).tolist() == [4, 4, 1]
    assert sampling_params.row_seeds(np.array([5]), rows=1).tolist() == [5]
    assert sampling_params.row_seeds(jnp.array([9, 2]), rows=2).tolist() == [9, 2]
    assert sampling_params.row_seeds(jnp.int32(6), rows=2).tolist() == [6, 7]
    assert sampling_params.row_seeds(None, rows=2).dtype == np.uint32
    assert not np.array_equal(sampling_params.row_seeds(None, rows=2), sampling_params.row_seeds(None, rows=2))
    for seed in (-1, 2**32 - 1, 1.5, True, "1", [1.0, 2.0], [1, -1]):
        with pytest.raises(ValueError, match="not an int in 0"):
            sampling_params.row_seeds(seed, rows=2)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 rows"):
        sampling_params.row_seeds([1, 2, 3], rows=2)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="eos_token_id 302 is not in the vocabulary of 302"):
        params_of(vocab_size=302)
    with pytest.raises(ValueError, match="pad_token_id 400 is not in the vocabulary of 320"):
        params_of(pad_token_id=400)

"""Augmentation of training clips: magnitudes, the same result for the same seed, and unchanged length."""

import numpy as np
import pytest
import sounds
from hypothesis import given, settings
from hypothesis import strategies as st
from records import chat, make_processor, open_records, write_clip

from qwen2audio_jax.train.augment import augment_samples, mask_features
from qwen2audio_jax.train.settings import AugmentSettings

SPEECH = sounds.speech(20_000)


def decibels(array) -> float:
    return 10 * np.log10(np.mean(np.square(array, dtype=np.float64)))


def test_gain_is_drawn_from_its_range():
    drawn = AugmentSettings(gain_db=(-9.0, 4.0))
    changes = [
        decibels(augment_samples(SPEECH, drawn, np.random.default_rng(seed))) - decibels(SPEECH) for seed in range(200)
    ]
    assert -9.001 < min(changes) < -8.5
    assert 3.5 < max(changes) < 4.001


def test_noise_has_the_ratio_and_the_probability():
    drawn = AugmentSettings(noise_probability=0.3, noise_snr_db=(7.0, 12.0))
    ratios = []
    for seed in range(300):
        samples = augment_samples(SPEECH, drawn, np.random.default_rng(seed))
        assert samples.dtype == np.float32
        assert samples.shape == SPEECH.shape
        if not np.array_equal(samples, SPEECH):
            ratios.append(decibels(SPEECH) - decibels(samples - SPEECH))
    assert 60 < len(ratios) < 120
    assert 6.8 < min(ratios) < 7.5
    assert 11.5 < max(ratios) < 12.2


def test_silence_stays_silent():
    drawn = AugmentSettings(noise_probability=1.0, gain_db=(1.0, 2.0))
    assert not augment_samples(np.zeros(500, np.float32), drawn, np.random.default_rng(0)).any()


@given(
    st.integers(1, 40), st.integers(0, 3), st.integers(0, 60), st.integers(0, 3), st.integers(0, 60), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_masks_are_stripes_of_the_mean(frames, time_masks, time_limit, mel_masks, mel_limit, seed):
    drawn = AugmentSettings(
        time_masks=time_masks, time_mask_frames=time_limit, mel_masks=mel_masks, mel_mask_bins=mel_limit
    )
    features = np.random.default_rng(1).normal(size=(16, 48)).astype(np.float32)
    masked = features.copy()
    mask_features(masked, frames=frames, settings=drawn, rng=np.random.default_rng(seed))
    assert np.array_equal(masked[:, frames:], features[:, frames:])  # the silence behind the clip
    changed = masked[:, :frames] != features[:, :frames]
    assert np.all(masked[:, :frames][changed] == features[:, :frames].mean())
    columns, rows = changed.all(axis=0), changed.all(axis=1)
    assert np.array_equal(changed, columns[None] | rows[:, None])
    if not rows.all():
        assert columns.sum() <= time_masks * time_limit
    if not columns.all():
        assert rows.sum() <= mel_masks * mel_limit


def test_masks_reach_their_limits_and_both_ends():
    drawn = AugmentSettings(time_masks=1, time_mask_frames=5)
    widths, places = set(), set()
    for seed in range(400):
        features = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)
        kept = features.copy()
        mask_features(features, frames=12, settings=drawn, rng=np.random.default_rng(seed))
        masked = np.flatnonzero((features != kept).all(axis=0))
        widths.add(len(masked))
        places.update(masked.tolist())
    assert widths == set(range(6))
    assert places == set(range(12))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"))


def test_a_dataset_augments_by_seed_epoch_and_record(tmp_path, processor):
    write_clip(tmp_path / "a.wav", 9000)
    records = [chat("<audio>x", "y", "a.wav", id=str(i)) for i in range(6)]
    drawn = AugmentSettings(gain_db=(-6.0, 6.0), noise_probability=0.5, time_masks=1, mel_masks=1)

    def clips(**options):
        dataset = open_records(
            tmp_path, records, processor=processor, rows=2, max_clips=3, max_tokens=256, frames=(60,), **options
        )
        found = []
        for batch, ids in dataset.batches(stop=2):  # two epochs of one step
            heard = batch.features[batch.frames > 0]
            assert (batch.frames[batch.frames > 0] == 57).all()
            assert heard.shape == (6, 128, 60)
            found.append(dict(zip(ids, heard, strict=True)))
        return found

    first, again, other = clips(augment=drawn), clips(augment=drawn), clips(augment=drawn, seed=4)
    plain = clips()
    evaluated = open_records(
        tmp_path,
        records,
        processor=processor,
        rows=2,
        max_clips=3,
        max_tokens=256,
        frames=(60,),
        augment=drawn,
        split="evaluate",
    )
    ((batch, _),) = evaluated.batches()
    for id in first[0]:
        assert np.array_equal(first[0][id], again[0][id])
        assert not np.array_equal(first[0][id], first[1][id])
        assert not np.array_equal(first[0][id], other[0][id])
        assert np.array_equal(plain[0][id], plain[1][id])
        assert not np.array_equal(first[0][id], plain[0][id])
    assert len({clip.tobytes() for clip in first[0].values()}) == 6  # each record's is its own
    assert all(np.array_equal(clip, plain[0]["0"]) for clip in batch.features[batch.frames > 0])

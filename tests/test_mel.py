"""The log-mel features against the reference's feature extractor, and the two forms of ours against each other."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sounds

from qwen2audio_jax.audio import log_mel, log_mel_batch, mel
from qwen2audio_jax.audio.mel import filter_bands, mel_filters

LENGTHS = [1, 159, 160, 161, 321, 322, 15_999, 16_000, 47_999, 479_520, 479_800, 479_959, 479_960, 479_999, 480_000]


def difference(ours, theirs) -> float:
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture
def extract(exact_features):
    """`extract(samples, **settings)`: features and mask of the reference's feature extractor, in float64."""

    def run(samples, **settings):
        extractor = exact_features(return_attention_mask=True, **settings)
        output = extractor(samples, sampling_rate=16_000, return_attention_mask=True, return_tensors="np")
        return output.input_features[0], output.attention_mask[0]

    return run


@pytest.mark.parametrize("num_mel_bins", [128, 80])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_reference(extract, num_mel_bins, length):
    samples = sounds.speech(length, seed=length)
    theirs, mask = extract(samples, feature_size=num_mel_bins)
    features, frames = log_mel(samples, num_mel_bins=num_mel_bins)
    assert features.dtype == np.float32
    assert features.shape == (num_mel_bins, 3000) == theirs.shape
    assert frames == mask.sum() == -(-length // 160)
    assert difference(features, theirs) < 2e-6


def test_a_shifted_filter_is_told(extract, monkeypatch):
    samples = sounds.speech(16_000)
    theirs, _ = extract(samples, feature_size=128)
    filters = mel_filters(128).copy()
    filters[1:, 64] = filters[:-1, 64]
    monkeypatch.setattr(mel, "filter_bands", lambda bins: [(slice(None), slice(None), filters.T.astype(np.float32))])
    assert difference(log_mel(samples)[0], theirs) > 2e-6


def test_reflects_at_a_loud_end(extract):
    """The last window reaches beyond a full clip, where the reference mirrors the sound."""
    samples = np.zeros(480_000, np.float32)
    samples[-200:] = sounds.speech(8_000)[-200:] + 0.5
    theirs, _ = extract(samples, feature_size=128)
    assert difference(log_mel(samples)[0], theirs) < 2e-6
    assert difference(log_mel_batch(samples[None], np.array([480_000]))[0][0], theirs) < 1e-5


@pytest.mark.parametrize("chunk_length", [1, 4, 20])
def test_other_maximum(extract, chunk_length):
    samples = sounds.speech(chunk_length * 16_000 - 333)
    theirs, mask = extract(samples, feature_size=80, chunk_length=chunk_length)
    features, frames = log_mel(samples, num_mel_bins=80, max_frames=chunk_length * 100)
    assert features.shape == theirs.shape
    assert frames == mask.sum()
    assert difference(features, theirs) < 2e-6


def test_the_shortest_maximum():
    samples = sounds.speech(320)
    padded = np.pad(samples, 200, mode="reflect")
    windows = np.stack([padded[:400], padded[160:560]]) * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400))
    expected = np.log10(np.abs(np.fft.rfft(windows)) ** 2 @ mel_filters(128))
    expected = (np.maximum(expected, expected.max() - 8) + 4) / 4
    assert difference(log_mel(samples, max_frames=2)[0], expected.T) < 2e-6


def assert_nearly_same_features(ours, host):
    """Equal to 1e-5 of the range, except for a few bins more than 60 dB below the loudest of their frame.

    There float32 cannot tell: the transform's rounding is of the size of the loudest bin.
    """
    error = np.abs(np.asarray(ours) - host) / np.abs(host).max()
    below_loudest = 40 * (host.max(axis=0) - host)  # in dB: a feature is a quarter of a logarithm to base 10
    assert error[below_loudest < 60].max() < 1e-5
    assert error.max() < 4e-5
    assert (error > 1e-5).sum() <= 4


def test_device_form_equals_host_form():
    lengths = [321, 16_000, 47_999, 63_999, 64_000]
    batch = np.full((len(lengths), 64_000), 7.0, np.float32)  # what lies behind a clip must not be read
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = sounds.speech(length, seed=length)
    for num_mel_bins in 128, 80:
        features, mask = log_mel_batch(batch, np.array(lengths), num_mel_bins=num_mel_bins, max_frames=500)
        assert features.shape == (5, num_mel_bins, 500)
        assert (features.dtype, mask.dtype) == (np.float32, np.int32)
        for row, length in enumerate(lengths):
            host, frames = log_mel(batch[row, :length], num_mel_bins=num_mel_bins, max_frames=500)
            assert_nearly_same_features(features[row], host)
            assert mask[row].sum() == mask[row, :frames].sum() == frames


def test_silence_has_the_reference_value():
    features, frames = log_mel(np.zeros(1600, np.float32))
    assert frames == 10
    assert np.all(features == np.float32(-1.5))
    assert np.all(np.asarray(log_mel_batch(np.zeros((1, 1600)), np.array([1600]))[0]) == np.float32(-1.5))


# librosa 0.11 imports audioread, and that modules which Python 3.13 no longer has.
@pytest.mark.filterwarnings("ignore:'(aifc|audioop|sunau)' is deprecated:DeprecationWarning")
@pytest.mark.parametrize("bins", [80, 128])
def test_filters_are_those_of_librosa_to_the_last_bit(bins):
    from librosa.filters import mel as librosa_mel

    theirs = librosa_mel(sr=16_000, n_fft=400, n_mels=bins, dtype=np.float64)
    assert np.array_equal(mel_filters(bins), theirs.T)


@pytest.mark.parametrize("bins", [1, 3, 40, 80, 128])
def test_bands_hold_all_filters_and_are_small(bins):
    rebuilt = np.zeros((201, bins), np.float32)
    for frequencies, filters, weights in filter_bands(bins):
        rebuilt[frequencies, filters] += weights.T
        assert mel.BLOCK * weights.size <= 1 << 18  # above, OpenBLAS takes threads
    assert np.array_equal(rebuilt, mel_filters(bins).astype(np.float32))


def test_other_threads_give_the_same_features():
    """The main one shares a long clip with a second; the bits are those of one alone."""
    for count in (480_000, 300_001, (mel.SHARED - 4) * mel.HOP, (mel.SHARED - 5) * mel.HOP):
        samples = sounds.speech(count)
        with ThreadPoolExecutor(3) as pool:
            there = list(pool.map(log_mel, [samples] * 3))
        here, frames = log_mel(samples)
        for features, their_frames in there:
            assert frames == their_frames
            assert np.array_equal(features, here)


def test_filters_are_the_references():
    audio_utils = pytest.importorskip("transformers.audio_utils")
    for bins in 80, 128:
        theirs = audio_utils.mel_filter_bank(201, bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
        assert difference(mel_filters(bins), theirs) < 1e-12


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"480001 samples .* 480000 that 3000 frames hold"):
        log_mel(np.zeros(480_001))
    with pytest.raises(ValueError, match=r"max_frames=1: at least 2"):
        log_mel(np.zeros(100), max_frames=1)
    with pytest.raises(ValueError, match=r"shape \(2, 500\)"):
        log_mel(np.zeros((2, 500)))
    with pytest.raises(ValueError, match=r"321 samples .* 160 that 1 frames hold"):
        log_mel_batch(np.zeros((1, 321)), np.array([321]), max_frames=1)
    with pytest.raises(ValueError, match=r"shape \(321,\)"):
        log_mel_batch(np.zeros(321), np.array([321]))

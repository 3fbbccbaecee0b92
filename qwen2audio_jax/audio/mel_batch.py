"""Log-mel features of many clips in JAX on a device: `log_mel_batch`, beside `mel.log_mel` on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen2audio_jax.audio.mel import FLOOR, HOP, RANGE, WINDOW, hann_window, mel_filters


@functools.partial(jax.jit, static_argnames=("num_mel_bins", "max_frames"))
def log_mel_batch(
    samples: jax.Array, lengths: jax.Array, *, num_mel_bins: int = 128, max_frames: int = 3000
) -> tuple[jax.Array, jax.Array]:
    """`log_mel` of several clips on the device, each by itself: what lies behind one clip's length is not read.

    Args:
        samples: [A, n] float, mono at 16 kHz, n <= max_frames * 160.
        lengths: [A] int, how many samples of each row are sound.
        num_mel_bins: mel filters M.
        max_frames: frames that are returned; 3000 are 30 s.

    Returns:
        features [A, M, max_frames] float32 and their mask [A, max_frames] int32, 1 where a frame is sound.

    Raises:
        ValueError: `samples` is not two-dimensional or longer than `max_frames` hold.
    """
    if samples.ndim != 2:
        raise ValueError(f"samples of shape {samples.shape}: pass clips as [A, n]")
    if samples.shape[1] > max_frames * HOP:
        raise ValueError(
            f"{samples.shape[1]} samples are more than the {max_frames * HOP} that {max_frames} frames hold: cut them"
        )
    clips, n = samples.shape
    samples = jnp.where(jnp.arange(n) < lengths[:, None], samples.astype(jnp.float32), 0.0)
    buffer = jnp.pad(samples, ((0, 0), (0, max_frames * HOP - n)))
    buffer = jnp.pad(buffer, ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    # A window is two and a half hops: three slices instead of a gather.
    hops = jnp.pad(buffer, ((0, 0), (0, 3 * HOP - WINDOW))).reshape(clips, max_frames + 3, HOP)
    windows = jnp.concatenate([hops[:, i : i + max_frames] for i in range(3)], axis=-1)[..., :WINDOW]  # [A, L, WINDOW]
    # The transform as two matrix products: 400 is no power of two, and accelerators multiply better than they shuffle.
    # Cosines are even about the middle and sines odd, so the halves are added and subtracted first: half the products,
    # and sums of half as many terms, which are more exact.
    half = WINDOW // 2
    angles = 2 * np.pi * np.outer(np.arange(half + 1), np.arange(half + 1)) / WINDOW
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    windows *= jnp.asarray(hann_window(), jnp.float32)
    left, right = windows[..., 1:half], windows[..., :half:-1]
    even = jnp.concatenate([windows[..., :1], left + right, windows[..., half : half + 1]], axis=-1)
    real = product(even, jnp.asarray(np.cos(angles), jnp.float32))
    imaginary = product(left - right, jnp.asarray(np.sin(angles[1:half]), jnp.float32))
    power = product(real**2 + imaginary**2, jnp.asarray(mel_filters(num_mel_bins), jnp.float32))
    log_power = jnp.log10(jnp.maximum(power, FLOOR)).transpose(0, 2, 1)  # [A, M, L]
    lowest = log_power.max(axis=(1, 2), keepdims=True) - RANGE
    features = (jnp.maximum(log_power, lowest) + 4.0) / 4.0
    mask = jnp.arange(max_frames) < -(-lengths[:, None] // HOP)
    return features, mask.astype(jnp.int32)

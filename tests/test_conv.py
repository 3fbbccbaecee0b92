"""The encoder's convolution in half precision, which CPUs compute as a product of windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen2audio_jax.model.encoder import Conv


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("stride", "frames"), [(1, 22), (2, 22), (2, 21), (1, 1), (2, 2)])
def test_is_the_convolution(stride, frames, dtype):
    rng = np.random.default_rng(0)
    conv = Conv(("mel", 5), ("audio_width", 7), stride=stride, rngs=nnx.Rngs(0))
    conv.kernel = nnx.Param(jnp.asarray(rng.normal(size=(3, 5, 7)), dtype))
    conv.bias = nnx.Param(jnp.asarray(rng.normal(size=7), dtype))
    x = jnp.asarray(rng.normal(size=(3, frames, 5)), dtype)
    kernel, bias, features = (np.asarray(each, np.float64) for each in (conv.kernel[...], conv.bias[...], x))
    padded = np.pad(features, ((0, 0), (1, 1), (0, 0)))
    wanted = np.stack(
        [np.einsum("awi,wio->ao", padded[:, start : start + 3], kernel) for start in range(0, frames, stride)], axis=1
    )
    found = conv(x)
    assert found.dtype == dtype
    scale = np.abs(wanted + bias).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted + bias, atol=scale * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_is_a_product_in_half_precision(dtype):
    conv = Conv(("audio_width", 8), ("audio_width", 8), stride=2, rngs=nnx.Rngs(0))
    program = jax.jit(lambda x: conv(x)).lower(jnp.ones((2, 22, 8), dtype)).as_text()
    assert ("stablehlo.convolution" in program) == (dtype == jnp.float32)

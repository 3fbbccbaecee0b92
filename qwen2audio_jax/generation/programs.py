"""Programs: the model's functions, compiled to round where the reference rounds."""

from functools import partial

import jax

program = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
"""`jax.jit` for what is called from the host.

In half precision XLA may keep intermediate results in float32, others in each program; so a batch's or a mesh's shape
would decide how a row's numbers are rounded. The reference's operations each round to the dtype, and so do these.
"""

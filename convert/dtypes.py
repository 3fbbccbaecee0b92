"""The dtypes in which a conversion can store parameters, by name."""

KEEP = "keep"
"""As the source has them."""
STORED = (KEEP, "float32", "bfloat16", "float16", "int8")

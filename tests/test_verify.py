"""What proves a converted checkpoint: its manifest, the listing made from it, and the comparison with its source."""

import hashlib
import json

import hf_layout
import numpy as np
import pytest

from qwen2audio_jax import checkpoint
from qwen2audio_jax.convert import convert, mapping


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_manifest_tells_where_every_parameter_comes_from(tmp_path, dtype):
    tensors = hf_layout.write_hf_checkpoint(tmp_path / "hf", "gqa", naming="old", dtype="bfloat16", shards=3)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    convert(tmp_path / "hf", tmp_path / "orbax", dtype=dtype)
    manifest = checkpoint.read_manifest(tmp_path / "orbax")
    assert manifest["source"] == {"source": str(tmp_path / "hf"), "revision": None, "commit": None, "dtype": dtype}
    stored = {hf_layout.renamed(name, "old"): value for name, value in tensors.items()}
    rows = {parameter: transform for _, parameter, transform in mapping.TABLE}
    seen = set()
    for name, each in manifest["parameters"].items():
        origin = each["origin"]
        value = stored[origin["tensor"]]
        seen.add(origin["tensor"])
        assert origin == {
            "file": index[origin["tensor"]],
            "tensor": origin["tensor"],
            "shape": list(value.shape),
            "dtype": "bfloat16",
            "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
        }
        kept = value if dtype == "keep" else value.astype(np.float16)
        reverse = rows["/".join("{n}" if part.isdigit() else part for part in name.split("/"))] == "reversed"
        parameter = np.ascontiguousarray(kept.transpose() if reverse else kept)
        assert each["sha256"] == hashlib.sha256(parameter.tobytes()).hexdigest()
        assert (each["shape"], each["dtype"]) == (list(parameter.shape), str(parameter.dtype))
    assert seen == stored.keys()
    assert manifest["totals"] == {
        "tensors": len(stored),
        "parameters": sum(value.size for value in stored.values()),
        "bytes": sum(value.nbytes for value in stored.values()),
    }

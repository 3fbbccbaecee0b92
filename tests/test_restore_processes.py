"""Two processes restore one checkpoint onto a mesh across both: each reads what its own devices hold."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from qwen2audio_jax.checkpoint import writer
from qwen2audio_jax.checkpoint.writer import save_params

ROOT = Path(__file__).resolve().parent.parent

PROCESS = """
import json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
number, port, path, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
sys.path.insert(0, sys.argv[5])
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec
from qwen2audio_jax.checkpoint.reader import restore_params
from qwen2audio_jax.parallel.sharding import make_mesh

mesh = make_mesh(data=1, model=8)
spec = lambda shape, *axes: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
specs = {
    "decoder": {"gate": {"kernel": spec((64, 16384), None, "model")}, "down": {"kernel": spec((16384, 64), "model")}},
    "encoder": {"bias": spec((8,))},
}
params = restore_params(path, specs=specs)
# What is mapped into memory counts when it is decoded.
metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/internal/riegeli/")
read = sum(metric["values"][0].get("value", 0) for metric in metrics if metric["name"].endswith("contiguous_bytes"))
held = {}
for place, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(key.key for key in place)
    for shard in leaf.addressable_shards:
        held[f"{name} {shard.index}"] = float(np.asarray(shard.data, np.float64).sum())
with open(out, "w") as file:
    json.dump({"read": read, "sums": held, "devices": len(jax.devices())}, file)
"""


def test_each_process_reads_its_own_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 256 << 10)
    rng = np.random.default_rng(0)
    gate, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 16384), (16384, 64)))
    bias = np.arange(8, dtype=np.float32)
    save_params(
        tmp_path / "checkpoint",
        {"decoder": {"gate": {"kernel": gate}, "down": {"kernel": down}}, "encoder": {"bias": bias}},
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(n), str(port), tmp_path / "checkpoint", tmp_path / f"{n}", ROOT],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for n in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    results = [json.loads((tmp_path / f"{n}").read_text()) for n in range(2)]
    total = gate.nbytes + down.nbytes
    sums = {}
    for result in results:
        assert result["devices"] == 8
        assert 0.5 * total < result["read"] < 0.6 * total
        sums |= result["sums"]
    part = 16384 // 8
    for k in range(8):
        columns, rows = gate[:, k * part : (k + 1) * part], down[k * part : (k + 1) * part]
        (of_gate,) = (v for name, v in sums.items() if "gate" in name and f"slice({k * part}," in name)
        (of_down,) = (v for name, v in sums.items() if "down" in name and f"slice({k * part}," in name)
        np.testing.assert_allclose(of_gate, columns.astype(np.float64).sum())
        np.testing.assert_allclose(of_down, rows.astype(np.float64).sum())
    assert [v for name, v in sums.items() if "bias" in name] == [28.0]

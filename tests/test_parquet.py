"""Parquet files with sounds in them: bytes, paths or both, as `datasets` writes them."""

import pytest

pytest.importorskip("pyarrow", reason="Parquet files need the extra `parquet`")

import pyarrow as pa
import pyarrow.parquet as pq

from qwen2audio_jax.batch.manifest import Manifest
from qwen2audio_jax.embedded import example
from qwen2audio_jax.engine.clips import open_clip


def records(*paths):
    with Manifest([str(path) for path in paths], prompt="default") as manifest:
        found = [manifest.record(position) for position in range(len(manifest))]
        return found, [[open_clip(clip) for clip in record.clips] for record in found if record.problem is None]


def test_columns_of_sounds(tmp_path):
    clip = example("tone").read_bytes()
    (tmp_path / "there.wav").write_bytes(clip)
    both = [{"bytes": clip, "path": "a.wav"}, {"bytes": None, "path": "there.wav"}, {"bytes": clip, "path": None}]
    pq.write_table(
        pa.table({"audio": both, "speaker": [1, 2, 3], "id": ["x", "y", "z"], "prompt": ["What?", None, "Who?"]}),
        tmp_path / "d.parquet",
        row_group_size=2,
    )
    pq.write_table(pa.table({"sound": [clip, b""], "score": [float("nan"), 1.0]}), tmp_path / "bytes.parquet")
    found, sounds = records(tmp_path / "d.parquet", tmp_path / "bytes.parquet")
    assert [record.id for record in found][:3] == ["x", "y", "z"]
    assert [record.prompt for record in found] == ["What?", "default", "Who?", "default", "default"]
    assert [record.meta for record in found] == [{"speaker": 1}, {"speaker": 2}, {"speaker": 3}, None, {"score": 1.0}]
    assert sounds == [[clip], [str(tmp_path / "there.wav")], [clip], [clip], [b""]]


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), tmp_path / "two.parquet")
    for name, said in (("no", "no whole Parquet"), ("text", "no column holds sounds"), ("two", "a and b both hold")):
        with pytest.raises(ValueError, match=said):
            Manifest([str(tmp_path / f"{name}.parquet")])
    pq.write_table(pa.table({"audio": [{"array": [0.0]}, {"array": [1.0]}]}), tmp_path / "arrays.parquet")
    with pytest.raises(ValueError, match="no record can be used"):
        records(tmp_path / "arrays.parquet")

"""Hostile checkpoints: refused with a ValueError or read whole, never a crash, a hang or a look outside the folder.

The long form is benchmarks/fuzz_checkpoints.py.
"""

import checkpoint_fuzz
import pytest
from hypothesis import HealthCheck, event, given, settings


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(checkpoint_fuzz.folders())
def test_hostile_folders(contents):
    event("read" if checkpoint_fuzz.attempt(contents) else "refused")


def test_the_watch_sees_a_stray_read(tmp_path, monkeypatch):
    """The fuzzer can fail: a reader that follows a path out of the folder is caught."""
    monkeypatch.setattr(checkpoint_fuzz.hf_folder, "inside", lambda folder, name: folder / name)
    weight_map = {"lm_head.weight": "../outside.safetensors"}
    index = checkpoint_fuzz.json.dumps({"weight_map": weight_map}).encode()
    with pytest.raises(AssertionError, match=r"outside\.safetensors"):
        checkpoint_fuzz.attempt({"model.safetensors.index.json": index})


def test_some_hostile_folders_are_read():
    """The strategies also make what is valid."""
    header = b'{"lm_head.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert checkpoint_fuzz.attempt({"model.safetensors": len(header).to_bytes(8, "little") + header + bytes(8)})

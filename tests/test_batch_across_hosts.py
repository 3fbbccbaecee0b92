"""A job on one mesh over several processes: what they tell each other. What they compute: test_batch_command.py."""

from qwen2audio_jax.batch.across_hosts import _decoded, _encoded
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.engine.clips import FilePiece
from qwen2audio_jax.parallel.process_rows import from_first


def test_a_record_arrives_as_it_was_sent():
    clips = ("a.wav", b"RIFF\0\xff", FilePiece("b.tar", 512, 99))
    record = Record("7", "m.jsonl:3", prompt="Wer spricht? \N{SNOWMAN}", clips=clips, options={"top_k": 3}, seed=5)
    assert _decoded(_encoded(record)) == record
    chat = Record("8", "m.jsonl:4", messages=[{"role": "user", "content": [{"type": "audio"}]}], clips=clips[:1])
    assert _decoded(_encoded(chat)) == chat


def test_one_process_tells_itself():
    assert from_first(b"abc") == b"abc"

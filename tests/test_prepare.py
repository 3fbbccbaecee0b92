"""Clips are loaded in processes that may abort, hang or run out of memory: that costs one request, and says so."""

import os
import pickle
import threading
import time

import numpy as np
import pytest

from qwen2audio_jax import Qwen2AudioProcessor
from qwen2audio_jax.embedded import example
from qwen2audio_jax.engine.prepare import Hearing, Preparation, Prepared
from qwen2audio_jax.engine.request import Request, RequestError, as_request_error


class Fault:
    """A file object whose reading ends badly."""

    def __init__(self, kind):
        self.kind = kind

    def read(self, size=-1):
        if self.kind == "abort":
            os.abort()
        if self.kind == "hang":
            time.sleep(600)
        if self.kind == "memory":
            return b"x" * (1 << 40)
        if self.kind == "exit":
            os._exit(3)
        raise OSError(5, "Input/output error")


@pytest.fixture(scope="module")
def processor():
    return Qwen2AudioProcessor.from_pretrained()


def outcomes(preparation, requests):
    found, done = {}, threading.Semaphore(0)

    def keep(index):
        def put(result):
            found[index] = result
            done.release()

        return put

    for index, request in enumerate(requests):
        preparation.submit(request, keep(index))
    for _ in requests:
        assert done.acquire(timeout=120)
    return [found[index] for index in range(len(requests))]


def test_decoders_that_end_badly_cost_their_request(processor):
    good = Request(prompt="What is said?", clips=(str(example("tone")),))
    kinds = ("abort", "hang", "memory", "exit", "broken")
    requests = [good, *(Request(prompt="x", clips=(Fault(kind),)) for kind in kinds), good, good]
    requests.insert(3, Request(prompt="x", clips=(lambda: None,)))  # it cannot be sent to another process
    preparation = Preparation(processor, hearing=Hearing(), workers=2, seconds=4.0, memory=3 << 30)
    try:
        results = outcomes(preparation, requests)
    finally:
        preparation.close()
    fine = [results.pop(index) for index in (8, 7, 0)]
    assert all(isinstance(result, Prepared) for result in fine)
    unsent = results.pop(2)
    assert [result.kind for result in results] == ["crash", "time", "memory", "crash", "failed"]
    assert "longer than 4 s" in str(results[1])
    assert "convert them to WAV" in str(results[0])
    assert unsent.kind == "failed"


def test_workers_hear_what_threads_hear(processor):
    requests = [
        Request(prompt="What is said?", clips=(str(example("tone")), np.zeros(16_000, np.float32))),
        Request(prompt="<|audio_bos|><|AUDIO|><|audio_eos|>Say it:", clips=(example("tone").read_bytes(),)),
        Request(messages=[{"role": "user", "content": [{"type": "audio"}]}], clips=(str(example("tone")),)),
        Request(prompt="Hello", system="Be brief."),
        Request(prompt="What is said?", clips=("/nowhere/a.wav",)),
        Request(prompt="two <|AUDIO|>", clips=()),
    ]
    found = []
    for workers in (0, 1):
        preparation = Preparation(processor, hearing=Hearing(truncation=True), workers=workers)
        found.append(outcomes(preparation, requests))
        preparation.close()
    for here, there in zip(*found, strict=True):
        if isinstance(here, RequestError):
            assert (here.kind, str(here)) == (there.kind, str(there))
            continue
        np.testing.assert_array_equal(here.ids, there.ids)
        assert here.frames == there.frames
        for one, other in zip(here.features, there.features, strict=True):
            np.testing.assert_array_equal(one, other)
    assert [error.kind for error in found[0][4:]] == ["missing", "input"]
    assert found[0][0].features[0].shape[1] < 3000


def test_inputs_of_the_processor_are_taken_as_they_are(processor):
    chat = [{"role": "user", "content": [{"type": "audio", "audio": str(example("tone"))}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, padding="max_length", max_length=512
    )
    preparation = Preparation(processor, hearing=Hearing(), workers=0)
    [prepared, twice] = outcomes(
        preparation, [Request(inputs=inputs), Request(inputs={"input_ids": np.zeros((2, 3), int)})]
    )
    preparation.close()
    assert len(prepared.ids) == inputs["attention_mask"].sum() < 512
    assert "make a request of each" in str(twice)


def test_errors_travel_and_tell_no_addresses():
    error = RequestError("a clip is missing", kind="missing")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.kind) == (str(error), error.kind)
    assert str(as_request_error(KeyError("0x7f001122"))) == "the processor or the model failed (KeyError)"
    assert as_request_error(MemoryError()).kind == "memory"

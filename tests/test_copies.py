"""Copies: what travels to a worker process or into a cache works there as it did here."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
from tiny_processor import write_processor_files

from qwen2audio_jax.compat.vllm import CompletionOutput, RequestOutput, SamplingParams
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.generation.generation_config import GenerationConfig
from qwen2audio_jax.generation.outputs import GenerateOutput
from qwen2audio_jax.limits import LIMITS
from qwen2audio_jax.processing.conversation import read_conversation
from qwen2audio_jax.processing.output import ProcessorOutput
from qwen2audio_jax.processing.processor import Qwen2AudioProcessor

WAYS = {
    **{
        f"pickle {protocol}": lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
CHAT = [{"role": "user", "content": "what is <|im_end|>? 你好 <|AUDIO|>"}]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Qwen2AudioProcessor.from_pretrained(write_processor_files(tmp_path_factory.mktemp("processor")))


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("way", WAYS)
def test_a_processor_s_copy_gives_the_same(way, used, processor):
    if used:
        processor.apply_chat_template(CHAT, tokenize=True)
    other = WAYS[way](processor)
    assert other is not processor
    wanted = processor.apply_chat_template(CHAT, tokenize=True)
    assert np.array_equal(other.apply_chat_template(CHAT, tokenize=True).input_ids, wanted.input_ids)
    assert other.decode(wanted.input_ids) == processor.decode(wanted.input_ids)
    clip = np.sin(np.arange(8000, dtype=np.float32) / 9)
    for one, two in zip(
        other.feature_extractor([clip]).items(), processor.feature_extractor([clip]).items(), strict=True
    ):
        assert one[0] == two[0]
        assert np.array_equal(one[1], two[1])


@pytest.mark.parametrize("way", WAYS)
def test_a_tokenizer_s_copy_gives_the_same(way, processor):
    tokenizer = processor.tokenizer
    other = WAYS[way](tokenizer)
    text = "the user <|im_start|>user hello"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.encode_plain(text) == tokenizer.encode_plain(text)
    assert (other.pad_token, other.eos_token_id) == (tokenizer.pad_token, tokenizer.eos_token_id)
    assert other.get_vocab() == tokenizer.get_vocab()
    assert other.to_json() == tokenizer.to_json()


def values(processor):
    output = processor(text="<|audio_bos|><|AUDIO|><|audio_eos|>what", audio=[np.zeros(4000, np.float32)])
    arrays = np.arange(4, dtype=np.int32)
    yield output, lambda copied: {name: value.tolist() for name, value in copied.items()}
    yield ProcessorOutput({}), dict
    yield GenerateOutput(arrays[None], arrays, arrays[None] * 0.5, ("eos",)), lambda copied: repr(copied)
    for value in (
        Qwen2AudioConfig(),
        GenerationConfig(eos_token_id=(3, 4), stop_strings="x"),
        processor.feature_extractor,
        SamplingParams(n=2, stop=["a"]),
        RequestOutput("0", "a", 3, [CompletionOutput(0, "b", [1], [-0.5], "stop")]),
        LIMITS,
        read_conversation(CHAT),
    ):
        yield value, lambda copied: copied


@pytest.mark.parametrize("way", WAYS)
def test_what_a_copy_can_do_too(way, processor):
    config = WAYS[way](GenerationConfig(top_k=7))
    assert GenerationConfig(top_k=3, top_p=0.5).updated(generation_config=config) == GenerationConfig(
        top_k=7, top_p=0.5
    )
    ids = WAYS[way](processor(text="hello the user")).input_ids
    assert ids.size(1) == ids.shape[1]
    assert ids.to("cuda").cpu().numpy().tolist() == processor(text="hello the user").input_ids.tolist()
    tokens = WAYS[way](processor.tokenizer)(["hello", "hello the user"])
    assert np.array_equal(tokens.input_ids, processor(text=["hello", "hello the user"]).input_ids)


@pytest.mark.parametrize("way", WAYS)
def test_configurations_and_outputs_copy(way, processor):
    for value, content in values(processor):
        assert content(WAYS[way](value)) == content(value), type(value)


def test_a_spawned_process_takes_a_processor(processor, tmp_path):
    (tmp_path / "processor.pickle").write_bytes(pickle.dumps((processor, CHAT)))
    code = (
        "import pickle, sys\n"
        "processor, chat = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(processor.apply_chat_template(chat, tokenize=True).input_ids.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "processor.pickle")], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == str(processor.apply_chat_template(CHAT, tokenize=True).input_ids.tolist()), (
        done.stderr
    )

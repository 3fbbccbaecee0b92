"""Code pasted from transformers', vLLM's and OpenAI's pages: it works, or says what to write instead.

Each snippet finds the embedded model and its processor, and a clip as samples, file and message of a chat.
"""

import base64
import copy
import io
import re
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, load_audio
from qwen2audio_jax.embedded import example, model_folder

QUESTION = "How many digits are spoken?"
PROMPT = f"<|audio_bos|><|AUDIO|><|audio_eos|>{QUESTION}"

MODEL_CARD = """
import torch
from io import BytesIO
import librosa
from urllib.request import urlopen
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

model = Qwen2AudioForConditionalGeneration.from_pretrained("Qwen/Qwen2-Audio-7B", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("Qwen/Qwen2-Audio-7B", trust_remote_code=True)

prompt = "<|audio_bos|><|AUDIO|><|audio_eos|>Generate the caption in English:"
url = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-Audio/glass-breaking-151256.mp3"
audio, sr = librosa.load(BytesIO(urlopen(url).read()), sr=processor.feature_extractor.sampling_rate)
inputs = processor(text=prompt, audios=audio, return_tensors="pt").to(model.device)

generate_ids = model.generate(**inputs, max_length=256)
generate_ids = generate_ids[:, inputs.input_ids.size(1):]
print(processor.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0])
"""
IMPORT = "from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration"


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    """What the snippets have in scope; loaded once."""
    folder = tmp_path_factory.mktemp("cache")
    model = Qwen2AudioForConditionalGeneration.from_pretrained(cache_dir=folder)
    processor = Qwen2AudioProcessor.from_pretrained()
    path = str(example("digits-4719"))
    audio = load_audio(path)
    chat = [
        {"role": "user", "content": [{"type": "audio", "audio_url": path}, {"type": "text", "text": QUESTION}]},
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    answer = model.generate(**inputs, max_new_tokens=8)[:, inputs.input_ids.shape[1] :]
    raw = processor(text=PROMPT, audio=audio)
    names = {
        "model": model,
        "processor": processor,
        "tokenizer": processor.tokenizer,
        "audio": audio,
        "path": path,
        "chat": chat,
        "inputs": inputs,
        "ids": answer,
        "text": processor.batch_decode(answer, skip_special_tokens=True)[0],
        "raw": raw,
        "prompt": PROMPT,
        "question": QUESTION,
        "folder": str(model_folder()),
        "cache": str(folder),
        "data": base64.b64encode(Path(path).read_bytes()).decode(),
        "np": np,
        "Path": Path,
    }
    names["load"] = lambda **words: Qwen2AudioForConditionalGeneration.from_pretrained(cache_dir=folder, **words)
    return names


def run(scope, code: str) -> dict:
    """The names after a snippet, which has a copy of the scope's and of its inputs."""
    names = {**scope, "inputs": copy.copy(scope["inputs"])}
    exec(compile(textwrap.dedent(code), "<snippet>", "exec"), names)
    return names


def test_the_model_card_s_example(scope, tmp_path, monkeypatch, capsys):
    """Nothing in it is changed but the import and `return_tensors`; the hub and the web are local files."""
    for name in ("torch", "librosa"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    samples = scope["audio"]
    monkeypatch.setattr(sys.modules["librosa"], "load", lambda file, sr: (samples, sr), raising=False)
    monkeypatch.setattr("urllib.request.urlopen", lambda url: io.BytesIO(Path(scope["path"]).read_bytes()))
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen2-Audio-7B").symlink_to(scope["folder"], target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN2AUDIO_CACHE", scope["cache"])
    code = MODEL_CARD.replace(IMPORT, IMPORT.replace("transformers", "qwen2audio_jax")).replace('"pt"', '"np"')
    names: dict = {}
    exec(compile(code, "<model card>", "exec"), names)
    said = capsys.readouterr().out
    inputs = scope["processor"](text=names["prompt"], audio=samples)
    ids = scope["model"].generate(**inputs, max_length=256)
    assert said.strip()
    assert (
        said == scope["processor"].batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0] + "\n"
    )


WORKS = {
    "2 size(1)": """
        inputs = processor(text=prompt, audios=audio)
        assert inputs.input_ids.size(1) == inputs["input_ids"].shape[1] == inputs["input_ids"].size()[1]
        assert inputs.input_ids.size == inputs.attention_mask.sum()
    """,
    "3 return_tensors np": """
        assert type(processor(text=prompt, audio=audio, return_tensors="np").input_features).__name__ == "TensorLike"
    """,
    "4 return_tensors jax": """
        import jax
        assert isinstance(processor(text=prompt, audio=audio, return_tensors="jax").to("cuda").input_ids, jax.Array)
    """,
    "5 inputs.to": """
        assert inputs.to("cuda") is inputs.to(model.device, model.dtype) is inputs
    """,
    "6 input_ids.to": """
        inputs.input_ids = inputs.input_ids.to("cuda")
        assert (model.generate(**inputs, max_new_tokens=8)[:, inputs.input_ids.size(1):] == ids).all()
    """,
    "11 eval, to, device, dtype": """
        assert model.eval() is model.to("cuda") is model.to(model.device).cuda() is model.cpu() is model
        assert model.device == model.mesh.devices.flat[0]
        assert model.dtype == np.float32 and model.to(np.float32) is model
        assert model.num_parameters() == sum(array.size for array in __import__("jax").tree.leaves(model.params))
    """,
    "12 Auto names": """
        from qwen2audio_jax import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
        from qwen2audio_jax import AutoModel, AutoModelForSeq2SeqLM, AutoModelForMultimodalLM
        assert AutoProcessor.from_pretrained(folder, trust_remote_code=True, use_fast=True).audio_token == "<|AUDIO|>"
        assert AutoTokenizer.from_pretrained(folder, padding_side="right").padding_side == "right"
        assert AutoFeatureExtractor.from_pretrained(folder).sampling_rate == 16000
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True) == model.config
        assert AutoModel is AutoModelForCausalLM is AutoModelForSeq2SeqLM is type(model)
    """,
    "13 pipeline": """
        from qwen2audio_jax import pipeline
        pipe = pipeline("any-to-any", model=model, processor=processor)
        [made] = pipe(text=chat, max_new_tokens=8, return_full_text=False)
        assert made == {"input_text": chat, "generated_text": text}
        [made] = pipe(chat, generate_kwargs={"max_new_tokens": 8})
        assert made["generated_text"] == [*chat, {"role": "assistant", "content": text}]
        [made] = pipe(text=prompt, audio=audio, max_new_tokens=3)
        assert made["generated_text"].startswith(prompt)
    """,
    "14 GenerationConfig": """
        from qwen2audio_jax import GenerationConfig
        given = GenerationConfig(max_new_tokens=3, do_sample=False, use_cache=True, num_beams=1, top_p=None)
        made = model.generate(**inputs, generation_config=given)
        assert (made[:, inputs.input_ids.size(1):] == ids[:, :3]).all()
        made = model.generate(**inputs, generation_config=given, max_new_tokens=2)
        assert made.size(1) == inputs.input_ids.size(1) + 2
        assert model.generate(**inputs, generation_config={"max_length": inputs.input_ids.size(1) + 1}).size(1)
    """,
    "15 GenerationConfig.from_pretrained": """
        from qwen2audio_jax import GenerationConfig
        assert GenerationConfig.from_pretrained(folder) == GenerationConfig.from_pretrained() == model.generation_config
    """,
    "18 use_cache, pad_token_id, eos_token_id": """
        more = {"use_cache": True, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        assert model.generate(**inputs, max_new_tokens=3, **more).size(1) == inputs.input_ids.size(1) + 3
    """,
    "20 TextIteratorStreamer": """
        from threading import Thread
        from qwen2audio_jax import TextIteratorStreamer
        streamer = TextIteratorStreamer(processor, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = Thread(target=model.generate, kwargs=dict(inputs, streamer=streamer, max_new_tokens=8))
        thread.start()
        assert "".join(streamer) == text
        thread.join()
    """,
    "21 generate(streamer=)": """
        import contextlib, io
        from qwen2audio_jax import TextStreamer
        with contextlib.redirect_stdout(io.StringIO()) as said:
            model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_special_tokens=True), max_new_tokens=8)
        assert said.getvalue().startswith("system") and said.getvalue().endswith("assistant\\n" + text + "\\n")
    """,
    "22 voice chat of the README": """
        import soundfile
        said = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        audios = []
        for message in chat:
            if isinstance(message["content"], list):
                for ele in message["content"]:
                    if ele["type"] == "audio":
                        audios.append(soundfile.read(ele["audio_url"])[0])
        inputs = processor(text=said, audios=audios, return_tensors="np", padding=True)
        inputs.input_ids = inputs.input_ids.to("cuda")
        generate_ids = model.generate(**inputs, max_length=inputs.input_ids.size(1) + 8)
        generate_ids = generate_ids[:, inputs.input_ids.size(1):]
        assert processor.batch_decode(generate_ids, skip_special_tokens=True)[0] == text
        assert generate_ids.cpu().numpy().tolist() == generate_ids.detach().tolist()
    """,
    "24 OpenAI input_audio": """
        item = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        chat = [{"role": "user", "content": [item, {"type": "text", "text": question}]}]
        same = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    """,
    "25 vLLM audio_url": """
        item = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + data}}
        chat = [{"role": "user", "content": [item, {"type": "text", "text": question}]}]
        same = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    """,
    "27 path": """
        chat = [{"role": "user", "content": [{"type": "audio", "path": path}, {"type": "text", "text": question}]}]
        same = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)
    """,
    "28 url": """
        item = {"type": "audio", "url": "data:audio/wav;base64," + data}
        chat = [{"role": "user", "content": [item, {"type": "text", "text": question}]}]
        same = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    """,
    "29 samples and rate": """
        item = {"type": "audio", "audio": (audio, 16000)}
        chat = [{"role": "user", "content": [item, {"type": "text", "text": question}]}]
        same = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    """,
    "30 a row of datasets": """
        item = {"type": "audio", "audio": {"array": audio, "sampling_rate": 16000, "path": None}}
        chat = [{"role": "user", "content": [item, {"type": "text", "text": question}]}]
        same = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    """,
    "31 array and rate": """
        made = processor(text=prompt, audio={"array": audio, "sampling_rate": 16000})
        assert (made.input_features == raw.input_features).all()
    """,
    "32 a path": """
        assert (processor(text=prompt, audio=path).input_features == raw.input_features).all()
    """,
    "33 bytes": """
        made = processor(text=prompt, audio=Path(path).read_bytes())
        assert (made.input_features == raw.input_features).all()
    """,
    "36 LLM, SamplingParams": """
        from qwen2audio_jax import LLM, SamplingParams
        with LLM(model=folder, trust_remote_code=True, max_num_seqs=2, gpu_memory_utilization=0.9) as llm:
            [first, second] = llm.chat([chat, chat], SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
            assert first.outputs[0].text == second.outputs[0].text == text
            assert first.outputs[0].token_ids == [id for id in ids[0].tolist()][:len(first.outputs[0].token_ids)]
            asked = {"prompt": prompt, "multi_modal_data": {"audio": [(audio, 16000)]}}
            [made] = llm.generate(asked, sampling_params=SamplingParams(temperature=0, max_tokens=3, seed=1))
            assert made.prompt_tokens == raw.input_ids.size(1) and made.outputs[0].finish_reason in ("stop", "length")
    """,
    "37 labels": """
        out = model(**inputs, labels=inputs.input_ids, return_dict=True, use_cache=False)
        assert np.isfinite(out.loss) and out.logits.shape[:2] == inputs.input_ids.shape
        assert (model(inputs).logits == out.logits).all()
    """,
    "40 generate(inputs)": """
        made = model.generate(inputs, max_new_tokens=8)
        assert (made[:, inputs.input_ids.size(1):] == ids).all()
        ids_alone = inputs.pop("input_ids")
        made = model.generate(ids_alone, **inputs, max_new_tokens=8)
        inputs.input_ids = ids_alone
        assert (made[:, inputs.input_ids.size(1):] == ids).all()
        assert "".join(model.stream(inputs, tokenizer=processor, max_new_tokens=8)) == text
    """,
    "41 the tokenizer": """
        assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
        assert tokenizer.eos_token_id in tokenizer.all_special_ids and len(tokenizer) > tokenizer.vocab_size
    """,
}


@pytest.mark.parametrize("code", WORKS.values(), ids=WORKS)
def test_what_works(code, scope):
    names = run(scope, code)
    if "same" in names:  # another form of the same chat
        for name, array in scope["inputs"].items():
            assert np.array_equal(names["same"][name], array), name


def test_options_of_loading(scope, monkeypatch, tmp_path):
    """7-10: what they mean here is taken, and the weights are loaded once for all of them."""
    words = {
        "device_map": "auto",
        "torch_dtype": "auto",
        "attn_implementation": "flash_attention_2",
        "trust_remote_code": True,
        "low_cpu_mem_usage": True,
        "use_safetensors": True,
        "load_in_8bit": False,
        "token": None,
        **dict.fromkeys(("dtype", "mesh", "adapter", "weights_dtype", "cache_dtype", "attention")),
    }
    loaded = scope["load"](**words)
    assert loaded.config == scope["model"].config
    model = run(scope, 'import jax.numpy as jnp\nmodel = load(torch_dtype=jnp.bfloat16, device_map={"": 0})')["model"]
    assert model.dtype.name == "bfloat16"


def test_saved_and_loaded_again(scope, tmp_path):
    """38: the processor's files before or after, and the same answers."""
    scope["processor"].save_pretrained(tmp_path / "saved")
    scope["model"].save_pretrained(tmp_path / "saved", safe_serialization=True, max_shard_size="400KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    again = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "saved", cache_dir=tmp_path / "cache")
    assert again.config.dtype == scope["model"].config.dtype
    assert again.generation_config == scope["model"].generation_config
    ids = again.generate(**scope["inputs"], max_new_tokens=8)
    assert np.array_equal(ids[:, scope["inputs"].input_ids.shape[1] :], scope["ids"])
    assert Qwen2AudioProcessor.from_pretrained(tmp_path / "saved").audio_token_id
    with pytest.raises(ValueError, match="holds a checkpoint; choose another folder"):
        scope["model"].save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob(".*"))


REMEDIES = {
    "1 return_tensors pt": ('processor(text=prompt, audios=audio, return_tensors="pt")', ValueError, 'use "np"'),
    "7 tensor parallel": ('load(tp_plan="auto")', ValueError, r"mesh=make_mesh\(model=N\)"),
    "8 a dtype": ('load(torch_dtype="int4")', ValueError, "not one of 'auto', 'float32'"),
    "8 two dtypes": ('load(dtype="float32", torch_dtype="float16")', TypeError, "give one of them"),
    "9 quantised": ("load(load_in_4bit=True)", ValueError, "weights_dtype='int8'"),
    "9 quantised, new": ("load(quantization_config=object())", ValueError, "weights_dtype='int8'"),
    "10 misspelt": ("load(trust_remote_cod=True)", TypeError, "did you mean trust_remote_code=?"),
    "10 token": ('load(token="hf_x")', ValueError, "HF_TOKEN"),
    "11 another dtype": ("model.to(np.float16)", ValueError, "load it with dtype='float16'"),
    "11 half": ("model.half()", AttributeError, "load it with dtype='float16'"),
    "11 train": ("model.train()", AttributeError, "qwen2audio train"),
    "11 parameters": ("list(model.parameters())", AttributeError, "model.params"),
    "11 requires_grad": ("model.requires_grad_(False)", AttributeError, "qwen2audio train"),
    "11 adapter": ('model.load_adapter("x")', AttributeError, "adapter=folder"),
    "11 tower": ("model.audio_tower", AttributeError, "model.encode_audio"),
    "11 forward": ("model.forward(**inputs)", AttributeError, r"model\(\*\*inputs\)"),
    "12 set_seed": ("from qwen2audio_jax import set_seed", ImportError, r"generate\(seed=1\)"),
    "12 Whisper's": ("from qwen2audio_jax import WhisperFeatureExtractor", ImportError, "AutoFeatureExtractor"),
    "12 vLLM's engine": ("from qwen2audio_jax import AsyncLLMEngine", ImportError, "qwen2audio_jax.engine.Engine"),
    "12 a trainer": ("from qwen2audio_jax import SFTTrainer, LoraConfig", ImportError, "qwen2audio train trains"),
    "12 the bare model": ("from qwen2audio_jax import Qwen2AudioModel", ImportError, "AutoModel another name of it"),
    "12 criteria": ("from qwen2audio_jax import StoppingCriteriaList", ImportError, "a function, or a list"),
    "12 transformers' class": (
        "from qwen2audio_jax import AutoModelForSpeechSeq2Seq",
        ImportError,
        "AutoModel another name",
    ),
    "13 another task": (
        'from qwen2audio_jax import pipeline\npipeline("automatic-speech-recognition", model=model)',
        ValueError,
        r"Tasks.from_pretrained\(source\).transcribe",
    ),
    "16 beams": (
        "from qwen2audio_jax import GenerationConfig\nGenerationConfig(num_beams=4)",
        ValueError,
        "num_beams=4 is not supported: there is no beam search: leave it out for greedy decoding, or set do_sample",
    ),
    "17 beams": ("model.generate(**inputs, num_beams=4)", ValueError, "leave it out for greedy decoding"),
    "19 output_scores": ("model.generate(**inputs, output_scores=True)", ValueError, "return_dict_in_generate=True"),
    "20 rows": (
        "from qwen2audio_jax import TextStreamer\n"
        "both = processor.apply_chat_template([chat, chat], tokenize=True)\n"
        "model.generate(both, streamer=TextStreamer(processor))",
        ValueError,
        "call generate once for each prompt",
    ),
    "23 pt": ('processor(text=prompt, audio=audio, return_tensors="pt")', ValueError, '"jax" for JAX arrays'),
    "26 vLLM file URL": (
        'processor(text=prompt, audio="file://" + path)',
        ValueError,
        "pass a local file by its path",
    ),
    "34 an image": (
        'processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "image": path}]}])',
        ValueError,
        'the type is "image"; an item is of type text or audio',
    ),
    "35 tools": ("processor.apply_chat_template(chat, tools=[{}])", TypeError, "tools=; it has no meaning here"),
    "36 tensor parallel": (
        "from qwen2audio_jax import LLM\nLLM(model=folder, tensor_parallel_size=2)",
        ValueError,
        "make_mesh",
    ),
    "36 penalties": (
        "from qwen2audio_jax import SamplingParams\nSamplingParams(presence_penalty=1.0)",
        ValueError,
        "use repetition_penalty",
    ),
    "37 nothing": ("model(labels=[[1]])", TypeError, r"as in model\(\*\*inputs\)"),
    "37 attentions": ("model(**inputs, output_attentions=True)", TypeError, "output_attentions"),
    "38 push": ('processor.save_pretrained("x", push_to_hub=True)', ValueError, "hf upload"),
    "38 push the model": ('model.save_pretrained("x", push_to_hub=True)', ValueError, "hf upload"),
    "38 misspelt": ('tokenizer.save_pretrained("x", push=True)', TypeError, "no option 'push'"),
    "39 a wrong rate": ("processor(text=prompt, audio=audio[::2], sampling_rate=8000)", ValueError, "resample"),
    "41 chat": ("tokenizer.apply_chat_template(chat)", AttributeError, "processor.apply_chat_template"),
    "41 longest": ("tokenizer.model_max_length", AttributeError, "max_position_embeddings"),
    "41 new tokens": ('tokenizer.add_tokens(["<x>"])', AttributeError, "the vocabulary is the checkpoint's"),
    "41 image": ("processor.image_processor", AttributeError, "this model hears"),
    "40 twice": ("model.generate(inputs, input_ids=inputs.input_ids)", TypeError, "input_ids is given twice"),
    "40 nothing": ("model.generate(max_new_tokens=3)", TypeError, r"generate\(\*\*inputs\)"),
}


@pytest.mark.parametrize(("code", "error", "words"), REMEDIES.values(), ids=REMEDIES)
def test_what_names_the_remedy(code, error, words, scope):
    with pytest.raises(error, match=words):
        run(scope, code)


def test_every_snippet_is_tried():
    tried = {int(re.match(r"\d+", name)[0]) for name in (*WORKS, *REMEDIES)}
    assert tried | {38} == set(range(1, 42))  # 38 has a test of its own

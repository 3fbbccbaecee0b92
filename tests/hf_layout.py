"""Checkpoints in the Hugging Face layout, written with numpy and safetensors alone: for where torch is missing."""

import copy
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import tiny
from safetensors.numpy import save_file
from tiny_processor import write_processor_files

NAMINGS = ("old", "new", "base_model")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a configuration under its new name (transformers >= 5.10), with torch's shape."""
    audio, text = config["audio_config"], config["text_config"]
    d, f = audio["d_model"], audio["encoder_ffn_dim"]
    tower = {
        "conv1.weight": (d, audio["num_mel_bins"], 3),
        "conv1.bias": (d,),
        "conv2.weight": (d, d, 3),
        "conv2.bias": (d,),
        "embed_positions.weight": (audio["max_source_positions"], d),
        "layer_norm.weight": (d,),
        "layer_norm.bias": (d,),
    }
    for n in range(audio["encoder_layers"]):
        layer = {f"self_attn.{p}_proj.weight": (d, d) for p in ("q", "k", "v", "out")}
        layer |= {f"self_attn.{p}_proj.bias": (d,) for p in ("q", "v", "out")}
        layer |= {f"{norm}.{part}": (d,) for norm in _ENCODER_NORMS for part in ("weight", "bias")}
        layer |= {"fc1.weight": (f, d), "fc1.bias": (f,), "fc2.weight": (d, f), "fc2.bias": (d,)}
        tower |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    w, i = text["hidden_size"], text["intermediate_size"]
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or w // heads
    q, kv = heads * head_dim, text["num_key_value_heads"] * head_dim
    decoder = {"embed_tokens.weight": (text["vocab_size"], w), "norm.weight": (w,)}
    for n in range(text["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj.weight": (q, w),
            "self_attn.q_proj.bias": (q,),
            "self_attn.k_proj.weight": (kv, w),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, w),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (w, q),
            "mlp.gate_proj.weight": (i, w),
            "mlp.up_proj.weight": (i, w),
            "mlp.down_proj.weight": (w, i),
            "input_layernorm.weight": (w,),
            "post_attention_layernorm.weight": (w,),
        }
        decoder |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    shapes = {f"model.audio_tower.{name}": shape for name, shape in tower.items()}
    shapes |= {"model.multi_modal_projector.linear.weight": (w, d), "model.multi_modal_projector.linear.bias": (w,)}
    shapes |= {f"model.language_model.{name}": shape for name, shape in decoder.items()}
    if not text.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (text["vocab_size"], w)
    return shapes


_ENCODER_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def renamed(name: str, naming: str) -> str:
    """A new name in another release's spelling."""
    if naming == "new":
        return name
    if naming == "base_model":
        return f"base_model.{name}"
    name = name.removeprefix("model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.")
    return name


def random_tensors(config: dict, *, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under their new names: norms about 1, matrices of a size that keeps activations about 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values /= np.prod(shape[1:]) ** 0.5
        else:
            values = values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        tensors[name] = values.astype(DTYPES[dtype])
    return tensors


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """Write the tensors under the names they have: one file, or `shards` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = names[k::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_hf_checkpoint(
    folder: Path,
    name: str,
    *,
    naming: str = "new",
    dtype: str = "float32",
    shards: int = 1,
    seed: int | None = None,
    layers: int | None = None,
) -> dict[str, np.ndarray]:
    """Write random weights of `tiny.CONFIGS[name]`, its config, processor and generation files; returns the weights."""
    config = copy.deepcopy(tiny.CONFIGS[name])
    config["torch_dtype"] = config["text_config"]["torch_dtype"] = dtype
    if layers is not None:
        config["audio_config"]["encoder_layers"] = config["text_config"]["num_hidden_layers"] = layers
    tensors = random_tensors(config, dtype=dtype, seed=tiny.SEEDS[name] if seed is None else seed)
    write_tensors(folder, {renamed(key, naming): value for key, value in tensors.items()}, shards=shards)
    (folder / "config.json").write_text(json.dumps(config))
    audio = config["audio_config"]
    write_processor_files(folder, num_mel_bins=audio["num_mel_bins"], max_frames=2 * audio["max_source_positions"])
    generation = {"do_sample": False, "eos_token_id": [tiny.IM_END, tiny.END_OF_TEXT], "pad_token_id": tiny.END_OF_TEXT}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return tensors

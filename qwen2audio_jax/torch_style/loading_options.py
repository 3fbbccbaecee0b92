"""Loading options as users of transformers write them: taken, without effect here, or refused with what to write."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

LOG = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")

# Option -> why it changes nothing here.
_WITHOUT_EFFECT = {
    "attn_implementation": "attention= chooses the kernel, by default the best there is; the answers are the same",
    "cache_dir": "the hub's client keeps its files in HF_HOME",
    "device": "mesh= says on which devices the model is; default: the first",
    "device_map": "mesh= says on which devices the model is; default: the first",
    "force_download": "the hub's cache is used as it is",
    "local_files_only": "HF_HUB_OFFLINE=1 keeps from the hub",
    "low_cpu_mem_usage": "weights are always read piece by piece",
    "max_memory": "mesh= says how the weights are split",
    "offload_buffers": "nothing is offloaded",
    "offload_folder": "nothing is offloaded",
    "offload_state_dict": "nothing is offloaded",
    "proxies": "the environment's proxies apply",
    "resume_download": "downloads are always resumed",
    "trust_remote_code": "no code of a checkpoint is ever run",
    "use_fast": "there is one tokenizer",
    "use_flash_attention_2": "attention= chooses the kernel, by default the best of the devices",
}
# Option -> (values that mean nothing, what to write instead of others).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "config": ((), "the checkpoint's config.json is the model's: edit that, or a copy of it"),
    "gguf_file": ((), "only safetensors weights are read"),
    "ignore_mismatched_sizes": ((False,), "weights must fit their configuration: mend config.json"),
    "key_mapping": ((), "rename the tensors in the file"),
    "load_in_4bit": ((False,), "weights_dtype='int8' is the smallest there is"),
    "load_in_8bit": ((False,), "use weights_dtype='int8'"),
    "output_loading_info": ((False,), "a checkpoint that does not fit is an error that lists what is wrong"),
    "quantization_config": ((), "use weights_dtype='int8', and cache_dtype='int8' for keys and values"),
    "state_dict": ((), "Qwen2AudioForConditionalGeneration(config, params) takes weights"),
    "subfolder": (("",), "name the subfolder in the path, as in from_pretrained(f'{folder}/{subfolder}')"),
    "token": ((True, False), "set the environment variable HF_TOKEN: the hub's client reads it"),
    "tp_plan": ((), "mesh=make_mesh(model=N) splits the model over N devices"),
    "use_auth_token": ((True, False), "set the environment variable HF_TOKEN: the hub's client reads it"),
    "use_safetensors": ((True,), "only safetensors weights are read: nothing of them can run code"),
    "variant": ((), "name the folder that holds that variant's files"),
    "weights_only": ((True,), "only safetensors weights are read"),
}


def take_loading_options(given: Mapping[str, Any], *, known: Sequence[str]) -> None:
    """Judge the options of `from_pretrained` that are not its own.

    Raises:
        TypeError: an unknown option; the nearest known one is named.
        ValueError: one of transformers that cannot be followed; what to write instead is named.
    """
    for name, value in given.items():
        if name in _WITHOUT_EFFECT:
            if value is not None:
                LOG.debug("%s=%r has no effect: %s", name, value, _WITHOUT_EFFECT[name])
        elif name in _REFUSED:
            neutral, remedy = _REFUSED[name]
            if value is not None and not any(value is each or value == each for each in neutral):
                raise ValueError(f"{name}={value!r} is not supported: {remedy}")
        else:
            near = difflib.get_close_matches(name, [*known, *_WITHOUT_EFFECT], n=1)
            hint = f"did you mean {near[0]}=?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"from_pretrained has no option {name!r}: {hint}")


# Option of saving -> (values that mean nothing, what to write instead of others).
_SAVING: dict[str, tuple[tuple[Any, ...], str]] = {
    "push_to_hub": ((False,), "save_pretrained(folder), and `hf upload` sends it"),
    "save_jinja_files": ((True,), "the template is written as chat_template.jinja, which every release reads"),
    "legacy_format": ((False,), "the tokenizer is written as tokenizer.json, which every release reads"),
    "filename_prefix": ((), "files have the names that from_pretrained looks for"),
    "is_main_process": ((True,), "call it in one process"),
    "state_dict": ((), "the model's own weights are written"),
    "variant": ((), "name a folder of its own"),
    "token": ((True, False), "set the environment variable HF_TOKEN: the hub's client reads it"),
}


def take_saving_options(given: Mapping[str, Any]) -> None:
    """Judge the options of transformers' `save_pretrained`.

    Raises:
        TypeError: an unknown option.
        ValueError: one that cannot be followed; what to do instead is named.
    """
    for name, value in given.items():
        if name not in _SAVING:
            raise TypeError(f"save_pretrained has no option {name!r}; give the folder")
        neutral, remedy = _SAVING[name]
        if value is not None and not any(value is each or value == each for each in neutral):
            raise ValueError(f"{name}={value!r} is not supported: {remedy}")


def dtype_name(dtype: Any, torch_dtype: Any = None) -> str:
    """The name of a dtype, given as such or as an object of torch, numpy or JAX, under either of its two keywords.

    Raises:
        TypeError: both keywords, with different dtypes.
        ValueError: none of those that the model computes in.
    """
    names = [_name(value) for value in (dtype, torch_dtype) if value is not None and _name(value) != "auto"]
    if len(set(names)) > 1:
        raise TypeError(f"dtype={names[0]!r} and torch_dtype={names[1]!r} are the same option: give one of them")
    return names[0] if names else "auto"


def _name(value: Any) -> str:
    text = value if isinstance(value, str) else getattr(value, "__name__", None) or str(value)
    name = text.removeprefix("torch.")
    name = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
        name, name
    )
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype={value!r} is not one of 'auto', {', '.join(map(repr, DTYPES))}")
    return name

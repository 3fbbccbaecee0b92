"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

Only adapters that add a low-rank product to linear maps and embeddings are read, with weights that were trained whole
and vectors of single tokens (`adapter_extras`); every other kind is refused by name, because it would compute something
else. Source: PEFT's `LoraConfig`, `save_pretrained` and `PeftModel.from_pretrained`.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qwen2audio_jax.checkpoint.adapter_extras import (
    PREFIX,
    Extras,
    find_extras,
    misshapen,
    missing_extras,
    token_indices,
)
from qwen2audio_jax.checkpoint.hf_folder import inside
from qwen2audio_jax.checkpoint.mapping import Target, canonical_name, expected_tensors, released_name
from qwen2audio_jax.checkpoint.safetensors_file import SafetensorsFile
from qwen2audio_jax.checkpoint.safetensors_writer import Planned, SafetensorsWriter
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.config.strict_json import describe, read_json_object
from qwen2audio_jax.model.lora import Settings, linear_shapes
from qwen2audio_jax.model.qwen2_audio import parameter_specs
from qwen2audio_jax.storage import hub
from qwen2audio_jax.storage.bucket import Folder, PathOrUrl, folder_at, is_there
from qwen2audio_jax.storage.write_whole import draft_of, write_whole

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"

_ADDITIVE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights unchanged."""

_KNOWN = (  # noqa: SIM905
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config "
    "megatron_core peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules "
    "task_type use_rslora modules_to_save trainable_token_indices"
).split()
"""Keys that are read by name, or that do not change what the stored tensors mean. Any other must be null or empty..."""
_NOTES = re.compile(r"^_|author|dataset|factory|license|swift|unsloth|_version$")
"""...or be another tool's note: what else PEFT may come to write there would change the tensors' meaning."""

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class _Pair:
    """The tensors of one linear map: `full` is its name in the model that PEFT adapted."""

    full: str
    tensors: dict[str, str]


def _modules(config: Qwen2AudioConfig) -> dict[str, tuple[str, ...]]:
    """Every linear map: canonical name of its module -> path in the parameter tree."""
    shapes = {"/".join((*path, "kernel")): shape for path, shape in linear_shapes(config).items()}
    targets = expected_tensors({name: tuple(shape) for name, shape in shapes.items()})
    return {name.removesuffix(".weight"): tuple(target.parameter.split("/")[:-1]) for name, target in targets.items()}


def save_adapter(
    folder: Path_, adapter: Mapping[str, Any], *, settings: Settings, config: Qwen2AudioConfig, base_model: str
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(model, folder)` loads.

    Args:
        folder: created if missing; an adapter in it is replaced, other files stay.
        adapter: see `model.lora`; stored in float32 under the names of transformers >= 5.10.
        settings: rank, alpha and dropout that it was trained with.
        config: of the model that it belongs to.
        base_model: the source of that model, recorded for users of the adapter.

    Raises:
        ValueError: the adapter does not fit the model or the settings, or `folder` is a file.
        OSError: the disk is full or fails; no adapter_config.json is left then.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place}: is a file; name a folder")
    shapes, flat, tensors = linear_shapes(config), flatten_dict(dict(adapter)), {}
    for module, path in _modules(config).items():
        for side, entry in (("A", "lora_a"), ("B", "lora_b")):
            if (array := flat.pop((*path, entry), None)) is not None:
                inputs, outputs = shapes[path]
                wanted = (inputs, settings.rank) if side == "A" else (settings.rank, outputs)
                if array.shape != wanted:
                    raise ValueError(f"{'/'.join((*path, entry))} has shape {array.shape}; {wanted} is needed")
                name = released_name(f"{module}.weight", naming="current").removesuffix(".weight")
                tensors[f"{PREFIX}{name}.lora_{side}.weight"] = np.ascontiguousarray(np.asarray(array, np.float32).T)
    if flat or not tensors or len(tensors) % 2:
        what = "/".join(next(iter(flat))) if flat else "half a pair" if tensors else "nothing"
        raise ValueError(f"the adapter holds {what}; it must hold lora_a and lora_b of linear layers of this model")
    place.mkdir(parents=True, exist_ok=True)
    (place / CONFIG).unlink(missing_ok=True)  # A configuration must never be beside tensors that it does not describe.
    with draft_of(place / WEIGHTS) as draft:
        _write_tensors(draft, tensors)
    text = json.dumps(_peft_config(tensors, settings=settings, config=config, base_model=base_model), indent=2)
    write_whole(place / CONFIG, f"{text}\n".encode())


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    writer = SafetensorsWriter(path, [Planned(name, array.dtype, array.shape) for name, array in tensors.items()])
    try:
        for array in tensors.values():
            writer.write([array])
        writer.finish()
    finally:
        writer.close()


def _peft_config(
    tensors: Mapping[str, Any], *, settings: Settings, config: Qwen2AudioConfig, base_model: str
) -> dict[str, Any]:
    adapted = {canonical_name(name.removeprefix(PREFIX)).rsplit(".lora_", 1)[0] for name in tensors}
    names = {module.rpartition(".")[2] for module in adapted}
    # In PEFT a name matches every module that ends in it: where that is too much, full module names are written.
    ending = {module for module in _modules(config) if module.rpartition(".")[2] in names}
    alpha = float(settings.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(names if ending == adapted else adapted),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def find_adapter(source: PathOrUrl) -> Folder:
    """The folder of an adapter: a folder, the URL of one in a bucket, or a hub id whose two files are downloaded.

    Raises:
        ValueError: none of these.
    """
    folder = folder_at(source)
    if folder.is_dir():
        return folder
    if not isinstance(source, str) or not hub.is_hub_id(source):
        raise ValueError(
            f"{source}: no such adapter folder, nor a hub id of the form owner/name; give a folder with {CONFIG} and "
            f"{WEIGHTS}"
        )
    return hub.download(source, revision=None, patterns=[CONFIG, WEIGHTS])


def load_adapter(folder: PathOrUrl, *, config: Qwen2AudioConfig) -> tuple[dict[str, Any], float]:
    """Read an adapter that PEFT, or `save_adapter`, wrote.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors; names as any release of transformers has them.
        config: of the model that it is for.

    Returns:
        The adapter (float32 numpy arrays, see `model.lora.by_parameter`) and its scale. Where maps have scales of
        their own (rank_pattern, alpha_pattern), the difference is in their lora_b.

    Raises:
        ValueError: no adapter there, a damaged file, an unsupported kind of adapter (its setting is named), or tensors
            that do not fit the model (all are listed).
    """
    settings_file, weights_file = _files(folder_at(folder))
    data = read_json_object(settings_file)
    _check_kind(data, where=settings_file)
    scaling = _read_scaling(data, where=settings_file)
    modules, shapes = _modules(config), linear_shapes(config)
    parameters = flatten_dict(parameter_specs(config), sep="/")
    targets = expected_tensors({name: tuple(leaf.shape) for name, leaf in parameters.items()})
    flat: dict[tuple[str, ...], np.ndarray] = {}
    with SafetensorsFile(weights_file) as file:
        pairs, others, problems = _pairs(file, modules)
        extras = find_extras(others, targets, tied=config.text_config.tie_word_embeddings)
        problems += [*extras.problems, *missing_extras(data, extras), *_missing(data, pairs, modules)]
        problems += _extra_problems(file, extras, data, scaling, targets)
        for module, pair in pairs.items():
            rank, (inputs, outputs) = scaling.rank_of(pair.full), shapes[modules[module]]
            for side, wanted in (("A", (rank, inputs)), ("B", (outputs, rank))):
                if side in pair.tensors:
                    problems += misshapen(file, pair.tensors[side], wanted)
        if problems:
            raise ValueError(f"{weights_file}: the adapter does not fit this model:\n  " + "\n  ".join(problems))
        for module, pair in pairs.items():
            own = np.float32(scaling.scale_of(pair.full) / scaling.scale)
            flat[*modules[module], "lora_a"] = _read(file, pair.tensors["A"]).T
            flat[*modules[module], "lora_b"] = _read(file, pair.tensors["B"]).T * own
        flat |= _read_extras(file, extras, data, scaling, targets)
    return unflatten_dict(flat), scaling.scale


def _files(place: Folder) -> tuple[Folder, Folder]:
    if not is_there(place / CONFIG):
        raise ValueError(f"{place}: holds no {CONFIG}; give a folder that PEFT's save_pretrained wrote")
    if not is_there(place / WEIGHTS):
        if is_there(place / _PICKLED):
            raise ValueError(f"{place}: {_PICKLED} is pickled, which is never read; save the adapter again with PEFT")
        raise ValueError(f"{place}: holds no {WEIGHTS}; copy the whole folder")
    return inside(place, CONFIG), inside(place, WEIGHTS)


@dataclass(frozen=True)
class _Scaling:
    """Ranks and factors of linear maps, by their names in the model that PEFT adapted."""

    rank: int
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool

    @property
    def scale(self) -> float:
        """The scale of linear maps that match no pattern."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, full: str) -> int:
        return int(_matching(self.ranks, full, default=self.rank))

    def scale_of(self, full: str) -> float:
        return self._scale(self.rank_of(full), _matching(self.alphas, full, default=self.alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _read_scaling(data: Mapping[str, Any], *, where: Folder) -> _Scaling:
    return _Scaling(
        # 8 is PEFT's own default of both.
        rank=int(_number(data.get("r", 8), name="r", whole=True, where=where)),
        alpha=_number(data.get("lora_alpha", 8), name="lora_alpha", whole=False, where=where),
        ranks=_pattern(data, "rank_pattern", whole=True, where=where),
        alphas=_pattern(data, "alpha_pattern", whole=False, where=where),
        rslora=bool(data.get("use_rslora")),
    )


def _check_kind(data: Mapping[str, Any], *, where: Folder) -> None:
    plain = "only LoRA on linear layers is read; merge it into the model with PEFT and load that"
    if data.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {describe(data.get('peft_type'))}, not LORA: {plain}")
    if data.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {describe(data['bias'])}, which trains biases too: {plain}")
    if not isinstance(data.get("use_rslora") or False, bool):
        raise ValueError(f"{where}: use_rslora is {describe(data['use_rslora'])}; it must be true or false")
    if data.get("init_lora_weights", True) not in _ADDITIVE:
        raise ValueError(
            f"{where}: init_lora_weights is {describe(data['init_lora_weights'])}, which changes the base model's "
            "weights: save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    for name, value in data.items():
        if name not in _KNOWN and value not in (None, False, [], {}, "") and not _NOTES.search(name):
            raise ValueError(f"{where}: {name} is {describe(value)}, which is not supported: {plain}")


def _number(value: Any, *, name: str, whole: bool, where: Folder) -> float:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < 1 << 31:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{where}: {name} is {describe(value)}; it must be {kind} above 0")
    return float(value)


def _pattern(data: Mapping[str, Any], name: str, *, whole: bool, where: Folder) -> dict[str, float]:
    pattern = data.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{where}: {name} is {describe(pattern)}; it must map names of modules to numbers")
    for key in pattern:
        if not re.fullmatch(r"[\w.]+", key):
            raise ValueError(
                f"{where}: {name} has the key {describe(key)}: only plain names of modules are read, no expressions"
            )
    return {key: _number(value, name=f"{name}.{key}", whole=whole, where=where) for key, value in pattern.items()}


def _matching(pattern: Mapping[str, float], full: str, *, default: float) -> float:
    """The first entry for a module, matched as in PEFT by its name or the end of it."""
    return next((value for key, value in pattern.items() if full == key or full.endswith(f".{key}")), default)


def _pairs(file: SafetensorsFile, modules: Mapping[str, Any]) -> tuple[dict[str, _Pair], list[str], list[str]]:
    """The pairs of linear maps by canonical module name, the names of other tensors, and problems with names."""
    pairs: dict[str, _Pair] = {}
    others, problems = [], []
    for name in file.entries:
        match = _TENSOR.fullmatch(name)
        if match is None:
            others.append(name)
            continue
        module = canonical_name(f"{match['module']}.weight").removesuffix(".weight")
        if module not in modules:
            problems.append(f"unexpected {name}: the model has no such linear layer")
            continue
        pair = pairs.setdefault(module, _Pair(match["module"].removeprefix(PREFIX), {}))
        if match["side"] in pair.tensors:
            problems.append(f"duplicate {name}: the same as {pair.tensors[match['side']]}")
        pair.tensors[match["side"]] = name
    for pair in pairs.values():
        problems += [f"missing lora_{side} of {pair.full}" for side in "AB" if side not in pair.tensors]
    if not file.entries:
        problems.append("it holds no tensors")
    return pairs, others, problems


def _extra_problems(
    file: SafetensorsFile, extras: Extras, data: Mapping[str, Any], scaling: _Scaling, targets: Mapping[str, Target]
) -> Iterator[str]:
    for tensor, name in extras.whole.items():
        yield from misshapen(file, name, targets[tensor].stored_shape)
    for tensor, sides in extras.pairs.items():
        rank, (rows, width) = scaling.rank_of(extras.full[tensor]), targets[tensor].stored_shape
        for side, wanted in (("A", (rank, rows)), ("B", (width, rank))):
            if side in sides:
                yield from misshapen(file, sides[side], wanted)
    for tensor, name in extras.tokens.items():
        rows, width = targets[tensor].stored_shape
        indices = token_indices(data, extras.full[tensor])
        if not indices or max(indices) >= rows:
            yield f"unexpected {name}: {CONFIG} has no trainable_token_indices below {rows} for it"
        yield from misshapen(file, name, (len(indices), width))


def _read_extras(
    file: SafetensorsFile, extras: Extras, data: Mapping[str, Any], scaling: _Scaling, targets: Mapping[str, Target]
) -> dict[tuple[str, ...], np.ndarray]:
    found: dict[tuple[str, ...], np.ndarray] = {}
    for tensor, name in extras.whole.items():
        value = _read(file, name)
        reverse = targets[tensor].transform == "reversed"
        found[*targets[tensor].parameter.split("/"), "whole"] = value.T if reverse else value
    for tensor, sides in extras.pairs.items():
        path, own = targets[tensor].parameter.split("/"), scaling.scale_of(extras.full[tensor]) / scaling.scale
        found[*path, "lora_a"] = _read(file, sides["A"]).T
        found[*path, "lora_b"] = _read(file, sides["B"]).T * np.float32(own)
    for tensor, name in extras.tokens.items():
        path = targets[tensor].parameter.split("/")
        found[*path, "tokens"] = np.asarray(token_indices(data, extras.full[tensor]), np.int32)
        found[*path, "values"] = _read(file, name)
    return found


def _missing(data: Mapping[str, Any], pairs: Mapping[str, _Pair], modules: Mapping[str, Any]) -> Iterator[str]:
    """Modules without tensors that plain names in target_modules match: PEFT stores all of them."""
    targets = data.get("target_modules")
    if isinstance(targets, list) and not data.get("exclude_modules") and data.get("layers_to_transform") is None:
        for module in modules:
            if module.rpartition(".")[2] in targets and module not in pairs:
                yield f"missing {module}: {CONFIG} targets {module.rpartition('.')[2]}"


def _read(file: SafetensorsFile, name: str) -> np.ndarray:
    whole = np.empty(file.entries[name].shape, np.float32)
    for start, block in file.blocks(name):
        whole[start : start + len(block)] = block
    return whole

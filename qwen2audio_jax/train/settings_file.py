"""Settings file of a training run: strict reading of TOML, with overrides from the command line.

An unknown name, or a value of another type or out of range, is a `ValueError` that names it. Paths are relative to the
file.
"""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from qwen2audio_jax.storage.local_path import check_path
from qwen2audio_jax.train.settings import LoraSettings, TrainSettings, check_settings

_TABLES = {name: kind for name, kind in typing.get_type_hints(TrainSettings).items() if dataclasses.is_dataclass(kind)}
_TABLES["lora"] = LoraSettings


def _fits(value: Any, kind: Any) -> Any:
    """`value` as the annotated type; raises a TypeError if it does not fit."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        kind = next(part for part in inside if part is not types.NoneType)
        return _fits(value, kind)
    if origin is typing.Literal:
        if value not in inside:
            raise TypeError(f"one of {', '.join(map(repr, inside))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or (inside[-1] is not Ellipsis and len(value) != len(inside)):
            raise TypeError("a list" if inside[-1] is Ellipsis else f"a list of {len(inside)}")
        return tuple(_fits(item, inside[0]) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError({str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind])
    if kind is float and not math.isfinite(value):
        raise TypeError("a finite number")
    return value


def _read_table(kind: Any, table: Any, *, where: str, above: Any = None) -> Any:
    """A settings dataclass from a parsed table; `above` holds the already read values of nested tables."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: a table of settings is needed, not {table!r}")
    hints, above = typing.get_type_hints(kind), above or {}
    known = [name for name in hints if name not in above]
    if unknown := set(table) - set(known):
        raise ValueError(f"{where}: no setting {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    values = dict(above)
    for name, value in table.items():
        try:
            values[name] = _fits(value, hints[name])
        except TypeError as error:
            raise ValueError(f"{where}: {name} = {value!r}, but {error} is needed") from None
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and _required(f)]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return kind(**values)


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def read_settings(
    path: str | PathLike[str], *, overrides: typing.Mapping[str, str] = types.MappingProxyType({})
) -> TrainSettings:
    """Read a training configuration.

    Args:
        path: TOML file. Paths in it are relative to its folder.
        overrides: settings that replace the file's, such as {"data.rows": "16"}; values in TOML syntax, strings also
            without quotes. Paths among them are relative to the working directory.

    Raises:
        ValueError: no such file, invalid TOML, or a setting that is unknown, missing, of another type or out of range.
    """
    check_path(path)
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        example = resources.files("qwen2audio_jax.configs") / "train-lora.toml"
        raise ValueError(
            f"no training configuration at {path}: {error.strerror}; check the path, or begin with a copy of {example}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    _resolve(tables, base=path.parent)
    for name, text in overrides.items():
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text
        table, _, key = name.rpartition(".")
        changed: dict[str, Any] = {key: value}
        _resolve({table: changed} if table else changed, base=Path.cwd())
        inside = tables.setdefault(table, {}) if table else tables
        if not isinstance(inside, dict):
            raise ValueError(f"{path}: {table} is {inside!r}, which has no setting {key!r}")
        inside.update(changed)
    inner = (
        {
            name: _read_table(kind, tables.pop(name), where=f"{path} [{name}]")
            for name, kind in _TABLES.items()
            if name in tables or name == "data"
        }
        if "data" in tables
        else {}
    )
    if not inner:
        raise ValueError(f"{path}: the table [data] is missing")
    settings: TrainSettings = _read_table(TrainSettings, tables, where=str(path), above=inner)
    check_settings(settings, where=str(path))
    return settings


def _resolve(tables: dict[str, Any], *, base: Path) -> None:
    """Make paths absolute, in place; a model that is not a folder relative to `base` may be a hub id and stays."""

    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or "://" in value:
            return value
        check_path(base / value)
        return str((base / value).resolve())

    if isinstance(model := tables.get("model"), str) and "://" not in model:
        check_path(base / model)
        if (base / model).exists():
            tables["model"] = absolute(model)
    if "output" in tables:
        tables["output"] = absolute(tables["output"])
    data = tables.get("data")
    if isinstance(data, dict):
        for name in ("train", "evaluate"):
            if isinstance(data.get(name), list):
                data[name] = [absolute(item) for item in data[name]]
        if "audio_root" in data:
            data["audio_root"] = absolute(data["audio_root"])


def parse_overrides(items: Sequence[str]) -> dict[str, str]:
    """The items of --set by dotted name; values are parsed together with the settings file.

    Raises:
        ValueError: an item is not of the form NAME=VALUE, or a name occurs twice.
    """
    overrides: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"--set {item!r} is no NAME=VALUE; write it as in --set data.rows=16")
        if name in overrides:
            raise ValueError(f"--set {name} is given twice, {overrides[name]!r} and {value!r}; leave out one")
        overrides[name] = value.strip()
    return overrides

"""The recorded plans of the published model: the bars that they must pass, and that the page shows what they say."""

import json
from functools import cache

import pytest
from tpu_programs import ROOT

from qwen2audio_jax.cli.main import main


@pytest.fixture
def machines(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plan_machines

    return plan_machines


@cache
def plans() -> dict[str, dict]:
    lines = (ROOT / "benchmarks" / "plan.jsonl").read_text().splitlines()
    return {record["name"]: record["plan"] for record in map(json.loads, lines)}


def plan(name: str) -> dict:
    if name not in plans():
        pytest.skip(f"not recorded: python benchmarks/plan_machines.py measure {name!r}")
    return plans()[name]


def test_every_record_is_what_its_command_says(machines):
    assert list(machines.records()) == [name for name in machines.COMMANDS if name in plans()]
    for name, record in machines.records().items():
        assert record["command"] == f"qwen2audio plan {machines.COMMANDS[name]} --json"


@pytest.mark.parametrize(
    ("name", "rows", "stored"),
    [("v5e:1x1, int8", 16, "int8"), ("v5e:2x2", 64, "bfloat16"), ("v5e:2x4", 128, "bfloat16")],
)
def test_so_many_rows_of_1024_fit(name, rows, stored):
    got = plan(name)
    assert (got["by"], got["fits"], got["weights"], got["cache"]) == ("compiling", True, stored, stored)
    assert got["prompt_tokens"] + got["max_new_tokens"] == got["shapes"]["capacity"] == 1024
    assert rows <= got["batch"] <= got["largest_batch"]
    assert set(got["stages"]) == {"encode", "prefill", "decode"}
    for stage in got["stages"].values():
        assert got["weights_bytes_per_chip"] + got["cache_bytes_per_chip"] < stage["peak_bytes_per_chip"]
        assert stage["peak_bytes_per_chip"] <= got["limit_bytes_per_chip"]


@pytest.mark.parametrize("name", ["v5e:1x1, int8", "v5e:2x2", "v5e:2x4", "v6e:2x4", "v5p:2x2x1"])
def test_the_next_size_does_not_compile(name):
    got = plan(name)
    over = got["next_batch"]
    assert over["rows"] == 2 * got["largest_batch"]
    assert over["stage"] in got["stages"]
    assert "RESOURCE_EXHAUSTED" in over["reason"]


def test_one_prompt_of_780_tokens():
    got = plan("v5e:2x4, one prompt")
    assert (got["by"], got["prompt_tokens"], got["clip_seconds"], got["shapes"]["frames"]) == (
        "compiling",
        780,
        30,
        3000,
    )
    assert got["peak_bytes_per_chip"] == max(stage["peak_bytes_per_chip"] for stage in got["stages"].values())


@pytest.mark.parametrize("name", ["v5e:2x2, LoRA", "v5e:2x4, LoRA", "v5p:2x2x2, full"])
def test_training_steps_fit(name):
    got = plan(name)
    assert (got["by"], got["fits"]) == ("compiling", True)
    assert got["peak_bytes_per_chip"] <= got["limit_bytes_per_chip"]


@pytest.mark.parametrize("name", ["l4x1, int8", "h100x8"])
def test_arithmetic_still_gives_what_is_recorded(name, machines, capsys):
    assert main(["plan", *machines.COMMANDS[name].split(), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got == plan(name) | {"versions": got["versions"]}


def test_the_page_shows_the_tables(machines):
    page = machines.PAGE.read_text()
    assert machines.with_tables(page) == page
    assert machines.with_tables(page.replace("| v5e:1x1 (compiled) |", "| v5e:1x1 |")) == page

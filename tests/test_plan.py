"""`plan`: names of machines, arithmetic against hand-computed numbers, and parsing of compiled programs."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tpu_programs
from filelock import FileLock
from jax.experimental import topologies
from tpu_programs import needs_libtpu

from qwen2audio_jax.cli.main import main
from qwen2audio_jax.config import Qwen2AudioConfig
from qwen2audio_jax.model.kv_cache import cache_specs
from qwen2audio_jax.parallel.mesh_presets import load_mesh_preset, mesh_preset_names
from qwen2audio_jax.parallel.sharding import make_mesh
from qwen2audio_jax.plan import arithmetic, topology, work
from qwen2audio_jax.plan.chips import CHIPS, GIB, find_chip
from qwen2audio_jax.plan.compiling import CompileError, OutOfMemory, _failure
from qwen2audio_jax.plan.inference import plan_inference
from qwen2audio_jax.plan.job import make_job
from qwen2audio_jax.plan.program import Collective, collectives, group_size, summary
from qwen2audio_jax.plan.report import report
from qwen2audio_jax.plan.request import Shapes, clip_seconds, make_request, shapes_of
from qwen2audio_jax.plan.resident import device_bytes, weight_specs
from qwen2audio_jax.plan.roofline import HOP_SECONDS, bound_of
from qwen2audio_jax.plan.search import Refusal, largest_batch, sizes_of
from qwen2audio_jax.plan.stages import STAGES, Batch, lower
from qwen2audio_jax.plan.table import inference_table
from qwen2audio_jax.plan.topology import abstract_mesh, check_compiler, mesh_sizes, parse_topology

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs" / "tiny.json")
PUBLISHED = Qwen2AudioConfig(dtype="bfloat16")


def request_for(name: str, *, batch: int = 8, prompt: int = 780, new: int = 244, **options):
    return make_request(
        PUBLISHED,
        topology=parse_topology(name),
        batch=batch,
        prompt_tokens=prompt,
        max_new_tokens=new,
        **options,
    )


def preset_sizes(preset: str) -> dict:
    return topology.preset_sizes(parse_topology(PRESET_MACHINES[preset]), preset)


PRESET_MACHINES = {
    "one-device": "h100x1",
    "v5e-8": "v5e:2x4",
    "v6e-8": "v6e:2x4",
    "v5p-8": "v5p:2x2x1",
    "8xh100": "h100x8",
    "v5e-16": "v5e:4x4",
    "2x8xh100": "h100x16",
}
"""Which machine each mesh preset is for."""


class TestTopology:
    def test_every_mesh_preset_is_planned_for(self):
        assert set(PRESET_MACHINES) == set(mesh_preset_names())
        for preset, machine in PRESET_MACHINES.items():
            known, sizes = load_mesh_preset(preset), preset_sizes(preset)
            request = request_for(machine, batch=16, **sizes)
            assert (request.data, request.model, request.num_slices) == (known.data, known.model, known.num_slices)
            if machine.startswith("h100"):
                assert plan_inference(request, search=False).fits

    @pytest.mark.parametrize(
        ("text", "name", "chips"),
        [
            ("v5e:2x4", "v5e:2x4", 8),
            ("v5e:1x1", "v5e:1x1", 1),
            ("V6E:2x4", "v6e:2x4", 8),
            ("v5litepod:4x4", "v5e:4x4", 16),
            ("v5p:2x2x1", "v5p:2x2x1", 4),
            ("v4:2x2x2", "v4:2x2x2", 8),
            ("h100x8", "h100x8", 8),
            ("h100", "h100x1", 1),
            ("a100-40gbx4", "a100-40gbx4", 4),
        ],
    )
    def test_names_a_machine(self, text, name, chips):
        got = parse_topology(text)
        assert (got.name, got.chips) == (name, chips)
        assert parse_topology(got.name) == got

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("v5e:3x3", "v5e comes in the slices 1x1, 2x2, 2x4"),
            ("v5p:2x2", "v5p comes in the slices 2x2x1"),
            ("v5e", "v5e:{1x1,2x2,2x4,"),
            ("v9:2x2", "v9:2x2"),
            ("h100:2x2", "h100"),
            ("h100x0", "there is no topology"),
            ("h100x5000", "at most 1024 GPUs"),
            ("", "there is no topology"),
        ],
    )
    def test_refuses_what_there_is_not(self, text, said):
        with pytest.raises(ValueError, match="topology") as refusal:
            parse_topology(text)
        assert said in str(refusal.value)

    def test_splits_the_decoder_over_all_chips_where_that_divides(self):
        assert mesh_sizes(parse_topology("v5e:2x4"), config=PUBLISHED) == (1, 8)
        assert mesh_sizes(parse_topology("v5e:8x8"), config=PUBLISHED) == (2, 32)
        assert mesh_sizes(parse_topology("v5e:2x4"), config=PUBLISHED, data=2) == (2, 4)
        assert mesh_sizes(parse_topology("v5e:2x4"), config=PUBLISHED, model=2) == (4, 2)
        assert mesh_sizes(parse_topology("h100x3"), config=PUBLISHED) == (3, 1)

    @pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 2, "model": 2}, {"model": 16}, {"data": 0}])
    def test_refuses_meshes_that_are_not_the_machine(self, sizes):
        with pytest.raises(ValueError, match=r"v5e:2x4 has 8"):
            mesh_sizes(parse_topology("v5e:2x4"), config=PUBLISHED, **sizes)

    def test_names_the_dimension_that_does_not_divide(self):
        with pytest.raises(ValueError, match="num_attention_heads=32 does not divide by the mesh's model=64"):
            mesh_sizes(parse_topology("v5e:8x8"), config=PUBLISHED, model=64)

    def test_every_chip_is_whole(self):
        names = [name for chip in CHIPS for name in (chip.name, *chip.aliases)]
        assert len(set(names)) == len(names)
        for chip in CHIPS:
            rates = (chip.hbm_bytes, chip.hbm_bandwidth, chip.bf16_flops, chip.int8_ops, chip.link_bandwidth)
            assert all(rate > 0 for rate in rates)
            assert chip.source
            assert (chip.kind == "tpu") == bool(chip.libtpu)

    def test_a_process_that_cannot_compile_is_told_how(self, monkeypatch):
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
        with pytest.raises(ValueError, match="JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1"):
            check_compiler()
        monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"\[plan\]"):
            check_compiler()

    def test_libtpu_that_another_process_holds_is_said(self, monkeypatch, tmp_path):
        def refuse(**options):
            raise jax.errors.JaxRuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

        monkeypatch.setattr(topologies, "get_topology_desc", refuse)
        monkeypatch.setattr(topology, "check_compiler", lambda: None)
        monkeypatch.setattr(topology, "_LOCK", FileLock(tmp_path / "lock"))
        with pytest.raises(ValueError, match="libtpu is held by another process"):
            topology.compile_devices(parse_topology("v5e:2x2"))


class TestArithmetic:
    def test_weights_and_cache_of_the_published_model(self):
        """8.397 B parameters; 0.5 MiB of cache a position."""
        whole = abstract_mesh(1, 1)
        assert device_bytes(weight_specs(PUBLISHED, mesh=whole)) == pytest.approx(2 * 8.397e9, rel=1e-4)
        sizes = {"rows": 8, "capacity": 2048, "mesh": whole}
        cache = cache_specs(PUBLISHED.text_config, dtype=jnp.dtype("bfloat16"), **sizes)
        assert device_bytes((cache.keys, cache.values)) == 8 * 2048 * GIB // 2048
        # The encoder (0.64 B) and the projector are whole on every chip, the rest is split.
        eighth = device_bytes(weight_specs(PUBLISHED, mesh=abstract_mesh(1, 8))) / 2
        assert eighth == pytest.approx(0.642e9 + (8.397e9 - 0.642e9) / 8, rel=2e-3)

    def test_int8_weights_and_cache_of_the_published_model(self):
        """7.12 GB for a decode step instead of 14.23; of the cache a byte a number and 4 a token and head."""
        whole = abstract_mesh(1, 1)
        params = weight_specs(PUBLISHED, mesh=whole, weights="int8")
        assert work.read_weights("decode", params) / 1e9 == pytest.approx(7.12, rel=2e-3)
        assert work.read_weights("encode", params) == work.read_weights("encode", weight_specs(PUBLISHED, mesh=whole))
        sizes = {"rows": 8, "capacity": 2048, "mesh": whole}
        cache = cache_specs(PUBLISHED.text_config, dtype=jnp.dtype("int8"), **sizes)
        assert device_bytes((cache.keys, cache.values)) == 2 * 32 * 8 * 2048 * 32 * (128 + 4)
        got = report(plan_inference(request_for("a100", weights="int8", cache="int8")), name="published")
        assert got["weights_bytes_per_chip"] == device_bytes(params)
        assert got["cache_bytes_per_chip"] == 2 * 32 * 8 * 1024 * 32 * (128 + 4)
        read = got["stages"]["decode"]["bytes_per_chip"]
        assert read == work.read_weights("decode", params) + got["cache_bytes_per_chip"]
        assert any("computation are bfloat16" in line for line in got["assumptions"])

    def test_flops_of_the_published_model(self):
        """Worked out by hand: what encoding, prefill and head cost."""
        for seconds, teraflops in ((30, 2.28), (10, 0.679), (1, 0.0642)):
            assert work.clip_flops(PUBLISHED, frames=100 * seconds) / 1e12 == pytest.approx(teraflops, rel=2e-3)
        # 32 layers of 4 * 4096^2 + 3 * 4096 * 11008 weights, twice each.
        assert work.token_flops(PUBLISHED) == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert work.attention_flops(PUBLISHED, positions=1024) == 32 * 4 * 4096 * 1024
        assert work.head_flops(PUBLISHED) == 2 * 4096 * 156032
        prompt = work.prompt_flops(PUBLISHED, tokens=780)
        assert prompt / 1e12 == pytest.approx(10.42, rel=1e-3)

    def test_a_decode_step_reads_all_but_encoder_and_embeddings(self):
        """14.23 GB of weights."""
        params = weight_specs(PUBLISHED, mesh=abstract_mesh(1, 1))
        assert work.read_weights("decode", params) / 1e9 == pytest.approx(14.23, rel=1e-3)
        tied = replace(PUBLISHED, text_config=replace(PUBLISHED.text_config, tie_word_embeddings=True))
        same = weight_specs(tied, mesh=abstract_mesh(1, 1))
        assert work.read_weights("decode", same) == work.read_weights("decode", params)
        assert work.read_weights("encode", params) / 2 == pytest.approx(0.642e9, rel=1e-2)

    def test_the_bound_of_a_decode_step_on_one_h100(self):
        """227, 1447 and 3413 tokens/s for 1, 8 and 32 rows of 1024 positions."""
        for rows, tokens in ((1, 227), (8, 1447), (32, 3413)):
            shapes = Shapes(rows, 1024, 1024, 0, 0)
            one = work.work_of("decode", PUBLISHED, shapes, mesh=abstract_mesh(1, 1), cache_dtype="bfloat16")
            bound = bound_of(one, [], chip=find_chip("h100"))
            assert rows / bound.seconds == pytest.approx(tokens, rel=0.005)
            assert bound.communication == 0

    def test_an_exchange_costs_its_bytes_and_its_hops(self):
        chip = find_chip("v5e")
        bound = bound_of(work.Work(0, 0), [Collective("all-reduce", 8_000_000, 8)], chip=chip)
        assert bound.seconds == pytest.approx(2 * 7 / 8 * 8e6 / 9e10 + 8 * HOP_SECONDS)

    def test_the_shapes_are_those_that_generate_pads_to(self):
        request = request_for("v5e:2x4", batch=5)
        assert clip_seconds(request) == 30
        assert request.clip_tokens == 750
        mesh = abstract_mesh(1, 8)
        assert shapes_of(request, rows=5, mesh=mesh) == Shapes(rows=5, tokens=832, capacity=1024, clips=8, frames=3000)
        assert shapes_of(request, rows=2, mesh=mesh).clips == 8
        short = request_for("v5e:2x4", prompt=155, new=100)
        assert clip_seconds(short) == 5
        assert shapes_of(short, rows=8, mesh=mesh) == Shapes(rows=8, tokens=160, capacity=256, clips=8, frames=502)
        text = request_for("v5e:2x4", prompt=30, new=34)
        assert shapes_of(text, rows=8, mesh=mesh) == Shapes(rows=8, tokens=32, capacity=128, clips=0, frames=0)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"batch": 0}, "--batch 0"),
            ({"batch": 1 << 17}, "at most 65536"),
            ({"prompt": 0}, "--prompt-tokens 0"),
            ({"prompt": 8000, "new": 200}, "8200 positions, but the model has 8192"),
            ({"weights": "int4"}, "--weights 'int4': there are"),
            (
                {"cache": "float32"},
                "--cache float32 beside --weights bfloat16: a cache has the dtype of the computation",
            ),
            ({"weights": "int8", "cache": "float16"}, "the dtype of the computation, bfloat16, or int8"),
            ({"num_slices": 2}, "a plan compiles for one TPU slice"),
        ],
    )
    def test_refuses_requests_that_cannot_be(self, options, said):
        with pytest.raises(ValueError, match="--") as refusal:
            request_for("v5e:2x4", **options)
        assert said in str(refusal.value)


# As two releases of libtpu print it; the last is within a loop of an asynchronous program.
PROGRAM = """
  %all-reduce = bf16[8,1,4096]{2,0,1:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=2, replica_groups=mesh['axis_0'=8,\
'axis_1'=1] {'axis_0'}, use_global_device_ids=true, to_apply=%add.1.clone
  %all-reduce.6 = (bf16[8,512,4096]{2,1,0:T(8,128)(2,1)S(1)}, bf16[8,512,4096]{2,1,0}) all-reduce(%x, %y), \
channel_id=2, replica_groups=mesh['data'=2,'model'=4] {'model'}, to_apply=%add.1.clone
  %all-gather.2 = f32[8,1,8]{2,1,0:T(1,128)S(1)} all-gather(%b), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %all-reduce.7 = f32[8]{0:T(128)S(1)} all-reduce(%g), replica_groups={{0},{1},{2},{3}}, to_apply=%region
  %reduce-scatter.1 = bf16[8,512]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={1}
  %all-gather-start.1 = (bf16[8,128]{1,0}, bf16[8,1024]{1,0:T(8,128)}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %all-gather-done.1 = bf16[8,1024]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
  %collective-permute-start = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%p), source_target_pairs={{0,1},{1,2}}
  %fusion.1 = f32[8]{0} fusion(%all-reduce), kind=kLoop
"""


class TestCompiledText:
    def test_finds_every_exchange_once(self):
        found = collectives(PROGRAM, devices=8)
        assert found == [
            Collective("all-reduce", 8 * 4096 * 2, 8),
            Collective("all-reduce", 2 * 8 * 512 * 4096 * 2, 4),
            Collective("all-gather", 8 * 8 * 4, 8),
            Collective("reduce-scatter", 8 * 512 * 2 * 4, 4),
            Collective("all-gather", 8 * 1024 * 2, 8),
            Collective("collective-permute", 8 * 128 * 2, 2),
        ]
        assert summary(found)["all-reduce"] == {"count": 2, "bytes": 8 * 4096 * 2 + 2 * 8 * 512 * 4096 * 2}

    def test_what_a_chip_sends_in_a_ring(self):
        assert Collective("all-reduce", 800, 8).sent == 1400
        assert Collective("all-gather", 800, 8).sent == 700
        assert Collective("collective-permute", 800, 2).sent == 800

    def test_reads_groups_in_every_form(self):
        assert group_size("replica_groups={{0,1},{2,3}}, x", devices=4) == 2
        assert group_size("replica_groups=[2,4]<=[8]", devices=8) == 4
        assert group_size("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", devices=8) == 8
        assert group_size("to_apply=%add", devices=8) == 8

    @pytest.mark.parametrize(
        ("message", "needed", "limit"),
        [
            (
                "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
                "HLO temporaries (33.88G) exceeds available HBM (15.75G).",
                33.88,
                15.75,
            ),
            (
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded hbm "
                "capacity by 768.00M.",
                16.5,
                15.75,
            ),
        ],
    )
    def test_tells_a_program_that_is_too_large(self, message, needed, limit):
        got = _failure(message)
        assert isinstance(got, OutOfMemory)
        assert got.needed == pytest.approx(needed * GIB, abs=1)
        assert got.limit == pytest.approx(limit * GIB, abs=1)

    @pytest.mark.parametrize(
        "message",
        [
            "INTERNAL: Mosaic failed to compile",
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 130.00M of 128.00M vmem.",
            "INVALID_ARGUMENT: a layout in HBM",
        ],
    )
    def test_from_one_that_fails_otherwise(self, message):
        assert isinstance(_failure(message), CompileError)


class TestSearch:
    @staticmethod
    def search(largest: int, *, start: int, resident=lambda rows: rows, limit: int = 1000):
        tried = []

        def attempt(rows):
            tried.append(rows)
            return Refusal(rows, "prefill", None, "too large") if rows > largest else None

        sizes = sizes_of(abstract_mesh(1, 8), dtype="bfloat16")
        got = largest_batch(attempt, sizes=sizes, resident=resident, limit=limit, start=start)
        return got, tried

    @pytest.mark.parametrize("start", [2, 64, 128, 512, 4096])
    def test_finds_the_largest_and_proves_the_next_too_large(self, start):
        got, tried = self.search(64, start=start)
        assert got.rows == 64
        assert got.refusal.rows == 128
        assert len(tried) == len(set(tried))

    def test_tries_the_size_above_even_where_arithmetic_rules_it_out(self):
        got, tried = self.search(512, start=512)
        assert (got.rows, got.refusal.rows, tried) == (512, 1024, [512, 1024])

    def test_says_so_where_nothing_fits(self):
        got, tried = self.search(0, start=8)
        assert (got.rows, got.refusal.rows) == (0, 2)
        got, tried = self.search(0, start=8, limit=1)
        assert (got.rows, tried) == (0, [2])

    def test_the_sizes_are_those_of_the_batches(self):
        assert sizes_of(abstract_mesh(1, 8), dtype="bfloat16")[:4] == [2, 4, 8, 16]
        assert sizes_of(abstract_mesh(3, 1), dtype="bfloat16")[:4] == [3, 6, 9, 18]


KEYS = {
    *("config", "topology", "chips", "chip", "mesh", "by", "versions", "batch", "prompt_tokens", "max_new_tokens"),
    *(
        "clip_seconds",
        "shapes",
        "weights",
        "cache",
        "mode",
        "attention",
        "fits",
        "limit_bytes_per_chip",
        "weights_bytes_per_chip",
    ),
    *("cache_bytes_per_chip", "temporary_bytes_per_chip", "peak_bytes_per_chip", "refusal", "largest_batch"),
    *("next_batch", "stages", "roofline", "transcription", "assumptions"),
}


class TestGPUs:
    def test_one_h100_by_arithmetic(self):
        plan = plan_inference(request_for("h100"))
        got = report(plan, name="published", job=make_job(1000, 10, longest=30))
        assert set(got) == {*KEYS, "job"}
        assert json.loads(json.dumps(got)) == got
        assert (got["fits"], got["by"]) == (True, "arithmetic")
        assert any("by arithmetic" in line for line in got["assumptions"])
        assert got["limit_bytes_per_chip"] == int(arithmetic.USABLE * 80e9)
        assert got["cache_bytes_per_chip"] == 4 * GIB
        assert got["attention"] == "cudnn"
        # Scores of one clip: 20 heads of 1500 x 1500. cuDNN keeps none; in float32 there is no cuDNN.
        assert got["stages"]["encode"]["temporary_bytes_per_chip"] < 8 * 20 * 1500**2 * 2
        exact = report(plan_inference(request_for("h100", weights="float32"), search=False), name="published")
        assert exact["attention"] == "xla"
        assert exact["stages"]["encode"]["temporary_bytes_per_chip"] > 8 * 20 * 1500**2 * 8
        assert got["peak_bytes_per_chip"] == max(one["peak_bytes_per_chip"] for one in got["stages"].values())
        assert got["roofline"]["tokens_per_second"] == pytest.approx(1447, rel=0.01)
        assert got["next_batch"]["rows"] == 2 * got["largest_batch"]
        assert got["next_batch"]["needed"] > got["limit_bytes_per_chip"]
        for stage in got["stages"].values():
            assert stage["collectives"] == {}
        said = inference_table(got)
        assert "by arithmetic" in said
        assert f"largest batch                     {got['largest_batch']}\n" in said

    def test_eight_of_them_exchange_two_sums_a_layer(self):
        got = report(plan_inference(request_for("h100x8")), name="published")
        assert got["mesh"] == {"data": 1, "model": 8, "num_slices": 1}
        step = got["stages"]["decode"]["collectives"]
        # A sum after the embedding as well, two for the token's log-probability; and the GPUs' candidates.
        assert step["all-reduce"] == {"count": 67, "bytes": 65 * 8 * 4096 * 2 + 2 * 8 * 4}
        assert step["all-gather"] == {"count": 2, "bytes": 2 * 8 * 8 * 4}

    def test_groups_of_one_exchange_the_clips_alone(self):
        got = report(plan_inference(request_for("h100x16", batch=16, **preset_sizes("2x8xh100"))), name="published")
        assert got["mesh"] == {"data": 16, "model": 1, "num_slices": 2}
        stages = got["stages"]
        assert stages["encode"]["collectives"] == stages["decode"]["collectives"] == {}
        assert stages["prefill"]["collectives"] == {"all-gather": {"count": 1, "bytes": 16 * 750 * 4096 * 2}}

    def test_the_batch_asked_for_alone(self):
        plan = plan_inference(request_for("h100"), search=False)
        got = report(plan, name="published")
        assert (got["fits"], got["largest_batch"], got["next_batch"]) == (True, None, None)
        assert "not searched for" in inference_table(got)

    def test_what_does_not_fit_is_said(self):
        plan = plan_inference(request_for("l4"))
        got = report(plan, name="published", job=make_job(10, 10, longest=30))
        assert (got["fits"], got["roofline"], got["transcription"], got["job"]) == (False, None, None, None)
        assert got["refusal"]["rows"] == 8
        assert got["largest_batch"] < 8
        assert "does not fit" in inference_table(got)

    def test_less_memory_means_fewer_rows(self):
        whole = plan_inference(request_for("h100x8")).largest.rows
        less = plan_inference(request_for("h100x8"), memory=20 * GIB)
        assert less.largest.rows < whole
        assert less.peak <= 20 * GIB < less.largest.refusal.needed

    def test_chip_hours_of_a_job_by_hand(self):
        request = request_for("h100")
        job = report(plan_inference(request), name="published", job=make_job(1000, 10, longest=30))["job"]
        # 10 s are 250 audio tokens beside the 30 of text; the encoder runs on 1002 frames, the prefill on 320 tokens.
        assert job["prompt_tokens"] == 280
        assert job["batches"] == 125
        chip = find_chip("h100")
        encode = 8 * work.clip_flops(PUBLISHED, frames=1002) / chip.bf16_flops
        prefill = 8 * work.prompt_flops(PUBLISHED, tokens=320) / chip.bf16_flops
        decode = 243 * (14.23e9 + 4 * GIB) / chip.hbm_bandwidth
        assert job["seconds_a_batch_at_least"] == pytest.approx(encode + prefill + decode, rel=2e-3)
        assert job["chip_hours_at_least"] == pytest.approx((encode + prefill + decode) * 125 / 3600, rel=2e-3)
        assert job["chip_hours"] == 2 * job["chip_hours_at_least"]

    def test_times_real_time_by_hand(self):
        got = report(plan_inference(request_for("h100"), search=False), name="published")
        speech, chip = got["transcription"], find_chip("h100")
        # 20 s are 500 audio tokens beside the 30 of text: 2002 frames, 576 tokens, 640 positions of the 8 rows' cache.
        assert (speech["clip_seconds"], speech["prompt_tokens"], speech["new_tokens"]) == (20, 530, 80)
        encode = 8 * work.clip_flops(PUBLISHED, frames=2002) / chip.bf16_flops
        prefill = 8 * work.prompt_flops(PUBLISHED, tokens=576) / chip.bf16_flops
        decode = 79 * (14.23e9 + 2.5 * GIB) / chip.hbm_bandwidth
        rate = 8 * 20 / (encode + prefill + decode)
        assert speech["times_real_time_at_most"] == pytest.approx(rate, rel=2e-3)
        assert speech["times_real_time"] == speech["times_real_time_at_most"] / 2
        assert f"{'  times real time at best':34}{speech['times_real_time_at_most']:.0f}\n" in inference_table(got)

    @pytest.mark.parametrize("room", [{"prompt": 20, "new": 1000}, {"prompt": 200}])
    def test_no_transcription_without_room_for_one(self, room):
        """Without a clip, or with a cache of fewer positions than a clip and its transcript take."""
        got = report(plan_inference(request_for("h100", **room), search=False), name="published")
        assert got["fits"]
        assert got["transcription"] is None
        assert "real time" not in inference_table(got)

    @pytest.mark.parametrize(("clips", "seconds"), [(0, 10), (10, 0), (10, 31), (10, math.nan)])
    def test_jobs_that_cannot_be(self, clips, seconds):
        with pytest.raises(ValueError, match=r"--clips|--mean-seconds"):
            make_job(clips, seconds, longest=30)


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--topology", "v5e:9x9"), "comes in the slices"),
            (("--topology", "v5e:2x4", "--config", "missing"), "there is no configuration named 'missing'"),
            (("--topology", "v5e:2x4", "--mesh", "data=2"), None),
            (("--topology", "v5e:2x4", "--mesh", "data=3,model=2"), "v5e:2x4 has 8"),
            (("--topology", "v5e:2x4", "--mesh", "rows=2"), "--mesh 'rows=2'"),
            (("--topology", "v5e:2x4", "--mesh", "8xh100"), None),
            (("--topology", "v5e:2x2", "--mesh", "v5e-8"), "it is for 8 chips, but v5e:2x2 has 4"),
            (("--topology", "v5e:4x4", "--mesh", "data=4,model=4,num_slices=2"), "compiles for one TPU slice"),
            (("--topology", "h100x8", "--mesh", "data=1,model=8,num_slices=2"), "do not fall into so many equal parts"),
            (("--topology", "v5e:2x4", "--train", "full", "--weights", "int8"), "leave out --weights"),
            (("--topology", "v5e:2x4", "--train", "full", "--no-search"), "leave them out"),
            (("--topology", "h100x8", "--clips", "10"), "--clips and --mean-seconds go together"),
            (("--topology", "h100x8", "--clips", "10", "--mean-seconds", "40"), "--mean-seconds 40"),
            (("--topology", "h100x8", "--memory-gib", "0"), "--memory-gib 0"),
            (("--topology", "h100x8", "--train", "full"), "for TPUs alone"),
            (("--topology", "v5e:2x4", "--train", "full", "--batch", "12"), "a multiple of 8"),
            (("--topology", "v5e:2x4", "--train", "missing.toml"), "no training configuration"),
            (("--topology", "v5e:2x4", "--train", "full", "--clips", "1", "--mean-seconds", "1"), "leave it out"),
        ],
    )
    def test_refuses_in_one_line(self, arguments, said, capsys, monkeypatch):
        # In this process no TPU is planned for.
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 7))
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        code = main(["plan", *arguments])
        error = capsys.readouterr().err
        if said is None:
            assert (code, error) == (7, "")  # nothing to refuse: on to the process that compiles
            return
        assert code == 2
        assert said in error
        assert error.count("\n") == 1

    def test_plans_for_gpus(self, capsys):
        assert main(["plan", "--config", TINY, "--topology", "h100x8", "--json", "--batch", "4"]) == 0
        got = json.loads(capsys.readouterr().out)
        assert set(got) == KEYS
        assert got["config"] == TINY
        assert main(["plan", "--config", TINY, "--topology", "h100"]) == 0
        assert "largest batch" in capsys.readouterr().out

    def test_compiles_in_a_process_started_for_it(self, monkeypatch):
        started = {}

        def run(command, env):
            started.update(command=command, env=env)
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        assert main(["plan", "--topology", "v5e:2x4"]) == 0
        assert started["command"] == [sys.executable, "-m", "qwen2audio_jax", "plan", "--topology", "v5e:2x4"]
        assert started["env"]["JAX_PLATFORMS"] == "cpu"
        assert started["env"]["TPU_SKIP_MDS_QUERY"] == "1"


def test_exchanges_of_a_tiny_model_over_eight_devices():
    """The counts that `test_the_stages_of_a_tiny_model_for_eight_chips` finds in what is compiled for TPUs."""
    config, mesh = Qwen2AudioConfig.from_json_file(TINY), make_mesh(data=1, model=8)
    sizes = {"batch": 8, "prompt_tokens": 62, "max_new_tokens": 2}
    request = make_request(config, topology=parse_topology("v5e:2x4"), **sizes)
    assert (request.data, request.model) == (1, 8)
    batch = Batch(config, mesh, shapes_of(request, rows=8, mesh=mesh), request.cache)
    found = {}
    for stage in STAGES:
        text = lower(stage, batch, mode=request.mode).compile().as_text()
        found[stage] = {kind: one["count"] for kind, one in summary(collectives(text, devices=8)).items()}
    # Two sums a layer, one for the embedding, two for the choice of the token; the devices' best candidates.
    assert found == {
        "encode": {},
        "prefill": {"all-reduce": 2 * 2},
        "decode": {"all-reduce": 2 * 2 + 3, "all-gather": 2},
    }


@cache
def planned(*arguments: str) -> dict:
    """The command's output for the tiny model, in the process that it starts."""
    return tpu_programs.report("-m", "qwen2audio_jax", "plan", "--config", TINY, "--json", *arguments)


# A prompt of 62 tokens holds a clip of 1.28 s; 64 positions.
SMALL = ("--topology", "v5e:2x4", "--batch", "8", "--prompt-tokens", "62", "--max-new-tokens", "2")


@needs_libtpu
class TestCompiling:
    def test_int8_weights_and_cache_on_one_chip(self):
        stored = ("--weights", "int8", "--cache", "int8")
        got = planned("--topology", "v5e:1x1", *SMALL[2:], *stored, "--no-search")
        assert (got["fits"], got["weights"], got["cache"], got["largest_batch"]) == (True, "int8", "int8", None)
        text = Qwen2AudioConfig.from_json_file(TINY).text_config
        numbers = 2 * text.num_hidden_layers * 8 * text.num_key_value_heads * 128
        assert got["cache_bytes_per_chip"] == numbers * (text.head_dim + 4)
        for stage in got["stages"].values():
            assert got["weights_bytes_per_chip"] + got["cache_bytes_per_chip"] < stage["peak_bytes_per_chip"]

    @pytest.mark.slow(seconds=20)
    def test_the_stages_of_a_tiny_model_for_eight_chips(self):
        got = planned(*SMALL, "--memory-gib", "0.008")
        assert set(got) == KEYS
        assert (got["fits"], got["by"], set(got["versions"])) == (True, "compiling", {"jax", "libtpu"})
        assert set(got["stages"]) == {"encode", "prefill", "decode"}
        for stage in got["stages"].values():
            assert got["weights_bytes_per_chip"] + got["cache_bytes_per_chip"] < stage["peak_bytes_per_chip"]
            assert stage["peak_bytes_per_chip"] <= got["limit_bytes_per_chip"]
        # Two sums a layer, one for the embedding, two for the choice of the token; the chips' best candidates.
        step = got["stages"]["decode"]["collectives"]
        assert {kind: one["count"] for kind, one in step.items()} == {"all-reduce": 2 * 2 + 3, "all-gather": 2}
        assert got["stages"]["encode"]["collectives"] == {}
        assert got["largest_batch"] >= 8
        assert got["next_batch"]["rows"] == 2 * got["largest_batch"]
        assert got["next_batch"]["needed"] > got["limit_bytes_per_chip"] == int(0.008 * GIB)

    @pytest.mark.slow(seconds=8)
    def test_a_batch_that_does_not_fit(self):
        got = planned(*SMALL, "--memory-gib", "0.0001")
        assert (got["fits"], got["largest_batch"], got["roofline"]) == (False, 0, None)
        assert got["refusal"]["stage"] == "decode"
        assert got["refusal"]["needed"] == got["peak_bytes_per_chip"] > got["limit_bytes_per_chip"]

    @pytest.mark.slow(seconds=20)
    def test_a_training_step(self):
        got = planned(*SMALL, "--train", "lora")
        assert got["fits"]
        assert got["mesh"] == {"data": 8, "model": 1}
        assert 0 < got["state_bytes_per_chip"] < got["frozen_bytes_per_chip"] < got["peak_bytes_per_chip"]

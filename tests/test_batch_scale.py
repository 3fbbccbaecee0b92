"""A job's memory does not grow with its records, and damaged files cost their record."""

import batch_scale
import pytest


def test_memory_of_a_long_job_is_flat(tmp_path):
    figures = batch_scale.records(tmp_path, 10_000)
    assert figures["largest_to_first_tenth"] <= 1.05
    low, high = figures["open_files"]
    assert high - low <= 4


def test_damaged_files_cost_their_record(tmp_path):
    figures = batch_scale.damaged(tmp_path, 500)
    assert figures["outcomes"]["truncated"] > 20
    assert figures["outcomes"]["corrupt"] > 5
    assert figures["outcomes"].get("failed", 0) == 0
    assert figures["largest_to_first_tenth"] <= 1.1
    low, high = figures["open_files"]
    assert high - low <= 4


@pytest.mark.long_job
@pytest.mark.slow(seconds=15)
def test_memory_of_a_model_s_long_job_is_flat(tmp_path):
    figures = batch_scale.model(tmp_path, 1000)
    assert (figures["errors"], figures["records"]) == (0, 1000)
    assert figures["largest_to_first_tenth"] <= 1.05


@pytest.mark.long_job
@pytest.mark.slow(seconds=8)
def test_a_million_lines_are_read_in_little_memory(tmp_path):
    figures = batch_scale.manifest(tmp_path, 1_000_000)
    assert figures["lines"] == 1_000_000
    assert figures["most_grown_MiB"] < 100

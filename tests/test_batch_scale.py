"""A job's memory does not grow with its records, and damaged files cost their record."""

import batch_scale


def test_memory_of_a_long_job_is_flat(tmp_path):
    figures = batch_scale.records(tmp_path, 10_000)
    assert figures["largest_to_first_tenth"] <= 1.05
    low, high = figures["open_files"]
    assert high - low <= 4


def test_damaged_files_cost_their_record(tmp_path):
    figures = batch_scale.damaged(tmp_path, 300)
    assert figures["outcomes"]["truncated"] > 20
    assert figures["outcomes"]["corrupt"] > 5
    assert figures["outcomes"].get("failed", 0) == 0
    assert figures["largest_to_first_tenth"] <= 1.1
    low, high = figures["open_files"]
    assert high - low <= 4

"""Batch inference: a manifest of records in, answers out as files that are written once, on one host or many."""

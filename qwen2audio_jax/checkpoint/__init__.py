"""Checkpoints: how they are read, written and described."""

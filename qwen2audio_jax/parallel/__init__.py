"""Parallelism: the sharding table, the order of devices, mesh presets, and rows of several processes."""

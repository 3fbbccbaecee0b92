"""Storage: folders in buckets, hub repositories, and files that are written whole or not at all."""

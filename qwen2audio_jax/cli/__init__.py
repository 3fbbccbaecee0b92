"""The command `qwen2audio`."""

"""Configurations as JSON: the two published models' and a tiny one's. `Qwen2AudioConfig.from_name` reads them."""

"""The model: pure functions of weights and inputs."""

"""Capacity planning: memory, communication and roofline of running or training the model on a given machine.

`inference.plan_inference` and `training.plan_training` answer a `request.Request` without the machine. For TPUs they
compile the real programs with libtpu, on a CPU; for GPUs they do arithmetic.
"""

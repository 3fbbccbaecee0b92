"""Synthetic speech: spoken digits, sums, tones and noise with questions about them, made with espeak-ng.

The training and test data of the embedded model come from here (`python -m qwen2audio_jax.speech data`), as do its
tokenizer and configuration (`... model`) and its scores (`qwen2audio evaluate`).
"""

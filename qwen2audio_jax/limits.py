"""The table of limits: all bounds beyond which external input is refused.

Each error message quotes the number from here, so a message can never disagree with the check.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """Bounds on accepted input; to change one, pass another instance to a function that takes `limits=`."""

    clip_seconds: float = 30.0
    """Longest clip that the encoder takes."""
    min_clip_samples: int = 321
    """Shortest clip, in samples at 16 kHz: 320 or fewer give no audio token."""
    peak: float = 16.0
    """Largest sample of floats whose full scale is 1: recordings and mixtures may exceed it, integers do by far."""
    file_bytes: int = 1 << 30
    """Largest audio file or response body that is read."""
    decoded_seconds: float = 12 * 3600.0
    """Longest decoded sound, checked before it is decoded."""
    decoded_bytes: int = 2 << 30
    """Largest decoded sound in memory (float32, all channels), checked before it is decoded."""
    resampled_samples: int = 12 * 3600 * 16_000
    """Maximum of samples after resampling, checked before resampling."""
    min_sampling_rate: int = 1_000
    max_sampling_rate: int = 768_000
    max_channels: int = 64
    url_seconds: float = 60.0
    """Time for one fetch, redirects included."""
    url_redirects: int = 5
    prepare_seconds: float = 120.0
    """Time that a worker process has for one request's clips."""
    worker_bytes: int = 4 << 30
    """Address space of a worker process."""
    clips_per_text: int = 64
    messages: int = 4096
    new_tokens: int = 32_768
    sequences_per_prompt: int = 256
    ngram: int = 64
    """Largest no_repeat_ngram_size: every step compares so many tokens, for all rows together."""
    stop_strings: int = 64
    stop_string_chars: int = 1024
    template_chars: int = 1 << 20
    """Longest chat template, and longest text that one may render beyond its messages."""
    template_seconds: float = 5.0
    safetensors_header_bytes: int = 100 * 1000 * 1000
    grammar_characters: int = 1 << 16
    """Of a schema, a regular expression or all choices together."""
    hotwords: int = 480
    hotword_characters: int = 128
    hotword_tokens: int = 64
    """Of one word: with the number of words it bounds what every step takes to the device."""
    json_bytes: int = 64 << 20
    """Largest configuration, index or tokenizer settings file."""
    config_size: int = (1 << 31) - 1
    """Largest width, depth or other size in a configuration: indices are 32-bit."""


LIMITS = Limits()
"""The defaults."""

LONG_LIMITS = replace(LIMITS, file_bytes=1 << 40, decoded_seconds=7 * 24 * 3600.0)
"""For sound that is decoded block by block and never held whole."""

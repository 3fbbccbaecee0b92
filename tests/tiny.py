"""The tiny random configurations that stand in for the published model: every dimension differs between them."""

# Ids of the tiny tokenizer's special tokens (tests/tiny_processor.py): 300 bytes-and-merges ids come first.
END_OF_TEXT, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS = range(300, 306)


def _config(audio: dict, text: dict) -> dict:
    return {
        "model_type": "qwen2_audio",
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_token_index": AUDIO,
        "ignore_index": -100,
        "torch_dtype": "float32",
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "activation_function": "gelu",
            "scale_embedding": False,
            **audio,
        },
        "text_config": {
            "model_type": "qwen2",
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": IM_END,
            "use_sliding_window": False,
            "torch_dtype": "float32",
            **text,
        },
    }


SEEDS = {"base": 0, "gqa": 7, "tied": 4, "mels80": 5}
"""Of each configuration's weights, chosen so that greedy decoding visits many tokens rather than repeat one."""

CONFIGS = {
    # Plain multi-head attention and the published front end: 128 mels, 1500 positions.
    "base": _config(
        {
            "num_mel_bins": 128,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 1500,
        },
        {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
        },
    ),
    # Grouped KV heads, an explicit head_dim, an odd vocabulary.
    "gqa": _config(
        {
            "num_mel_bins": 128,
            "encoder_layers": 3,
            "encoder_attention_heads": 5,
            "encoder_ffn_dim": 56,
            "d_model": 40,
            "max_source_positions": 150,
        },
        {
            "vocab_size": 321,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 10,
            "max_position_embeddings": 1024,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-6,
        },
    ),
    # Embedding and head are one matrix, because the configuration says so.
    "tied": _config(
        {
            "num_mel_bins": 128,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 24,
            "max_source_positions": 200,
        },
        {
            "vocab_size": 336,
            "hidden_size": 56,
            "intermediate_size": 112,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "mels80": _config(
        {
            "num_mel_bins": 80,
            "encoder_layers": 4,
            "encoder_attention_heads": 6,
            "encoder_ffn_dim": 40,
            "d_model": 36,
            "max_source_positions": 100,
        },
        {
            "vocab_size": 311,
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 640,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
        },
    ),
}

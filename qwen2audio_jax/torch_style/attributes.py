"""What to use instead of attributes that processors, tokenizers and feature extractors of transformers have."""

from collections.abc import Mapping

_HUB = "save_pretrained(folder), and `hf upload` sends it"
_NO_CODE = "no code of a checkpoint is ever run"
_VOCABULARY = "the vocabulary is the checkpoint's, and the model knows no other token"
EXTRACTOR: Mapping[str, str] = {
    "fetch_audio": "a call takes paths, URLs and bytes itself, and load_audio(source) gives the samples",
    "push_to_hub": _HUB,
    "register_for_auto_class": _NO_CODE,
    "zero_mean_unit_var_norm": "this model's clips are not normalised: pass them as they are",
}
PROCESSOR: Mapping[str, str] = {
    "image_processor": "this model hears, and sees nothing",
    "post_process_image_text_to_text": "batch_decode(ids, skip_special_tokens=True) gives the texts",
    "push_to_hub": _HUB,
    "register_for_auto_class": _NO_CODE,
    "validate_inputs": "a call checks its arguments itself",
}
TOKENIZER: Mapping[str, str] = {
    "add_special_tokens": _VOCABULARY,
    "add_tokens": _VOCABULARY,
    "additional_special_tokens": "all_special_tokens has them",
    "apply_chat_template": "the processor has it: processor.apply_chat_template(conversation, tokenize=True)",
    "backend_tokenizer": "to_json() gives the tokenizer of the tokenizers library as text",
    "batch_encode_plus": "call the tokenizer itself, tokenizer(texts)",
    "chat_template": "the processor has it: processor.chat_template",
    "convert_tokens_to_string": "decode(ids) gives the text",
    "encode_plus": "call the tokenizer itself, tokenizer(text)",
    "from_pretrained": "AutoTokenizer.from_pretrained(source) reads one",
    "init_kwargs": "settings has them",
    "model_max_length": "texts are never cut: config.text_config.max_position_embeddings is the model's limit",
    "push_to_hub": _HUB,
    "save_vocabulary": "save_pretrained(folder) writes tokenizer.json",
    "truncation_side": "texts are never cut",
    "vocab": "get_vocab() gives it",
}


def no_attribute(owner: str, name: str, instead: Mapping[str, str]) -> AttributeError:
    """The error for an attribute that an owner does not have, with what to use instead where that is known."""
    remedy = f": {instead[name]}" if name in instead else ""
    return AttributeError(f"the {owner} has no attribute {name!r}{remedy}")

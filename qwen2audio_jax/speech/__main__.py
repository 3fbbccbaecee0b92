"""`python -m qwen2audio_jax.speech`: synthesise data, and make the embedded model."""

import argparse
import json
import sys
from collections.abc import Sequence

from qwen2audio_jax.speech import dataset
from qwen2audio_jax.speech.model_files import write_model_files
from qwen2audio_jax.speech.package_clips import write_examples


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input gives one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m qwen2audio_jax.speech", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="synthesise examples into a new folder")
    data.add_argument("out")
    data.add_argument("--clips", type=int, required=True, help="number of examples")
    data.add_argument("--seed", type=int, required=True)
    data.add_argument("--split", choices=dataset.SPLITS, default="train")
    data.add_argument("--workers", type=int, default=2)
    model = commands.add_parser(
        "model", help="write the embedded model's files, all but the weights, into a new folder"
    )
    model.add_argument("out")
    examples = commands.add_parser("examples", help="write the clips that come with the package")
    examples.add_argument("out")
    build = commands.add_parser(
        "build", help="make the embedded model from nothing: data, training, scores; goes on where it was stopped"
    )
    build.add_argument("out")
    build.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="as for qwen2audio train")
    check = commands.add_parser("disjoint", help="check that two data folders share no clip")
    check.add_argument("a")
    check.add_argument("b")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "data":
            manifest = dataset.write_dataset(
                arguments.out,
                clips=arguments.clips,
                seed=arguments.seed,
                split=arguments.split,
                workers=arguments.workers,
            )
            print(json.dumps(manifest, indent=2))
        elif arguments.command == "model":
            print(write_model_files(arguments.out))
        elif arguments.command == "build":
            # Imported here: training needs more than the rest, and the rest starts at once without it.
            from qwen2audio_jax.speech.build import build as build_model
            from qwen2audio_jax.train.settings_file import parse_overrides

            overrides = parse_overrides(arguments.set)
            print(build_model(arguments.out, overrides=overrides, say=lambda text: print(text, file=sys.stderr)))
        elif arguments.command == "examples":
            print(*write_examples(arguments.out), sep="\n")
        elif shared := dataset.clips_in_both(arguments.a, arguments.b):
            raise ValueError(
                f"{len(shared)} clips are in both {arguments.a} and {arguments.b}: {', '.join(shared[:3])}"
            )
        else:
            print("no clip is in both")
    except (ValueError, OSError) as e:
        print(f"python -m qwen2audio_jax.speech: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

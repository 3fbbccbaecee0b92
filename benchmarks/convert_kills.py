"""Kill test of a 1 GB conversion: killed 20 times at random moments, and resumed after each kill.

    python benchmarks/convert_kills.py /big/folder [--kills 20] [--seed 0]

After every kill: no state in between may load, and nothing that was finished may be lost. Every conversion that comes
to its end is verified against its source, bit for bit. Results: convert_7b.md.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from convert_7b import ROOT, write_source


def finished(ckpt: Path) -> int:
    """Bytes of parameters that the journal names."""
    path = ckpt / ".qwen2audio_jax_journal"
    total = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if line.endswith(b"\n"):
            total += sum(each["bytes"] for each in json.loads(line).get("parameters", {}).values())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    src, ckpt = options.place / "src", options.place / "ckpt"
    if not src.exists():
        write_source(src, scale="1gb")
    shutil.rmtree(ckpt, ignore_errors=True)
    from qwen2audio_jax.checkpoint.reader import is_checkpoint
    from qwen2audio_jax.convert import verify

    command = [sys.executable, "-m", "convert", str(src), str(ckpt), "--quiet", "--memory-gb", "0.6"]
    began = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT)
    whole = time.monotonic() - began
    shutil.rmtree(ckpt)
    print(f"undisturbed: {whole:.1f} s", flush=True)
    rng = random.Random(options.seed)
    kills = ends = most = 0
    while kills < options.kills or ckpt.exists():
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            process.wait(rng.uniform(0.05, 0.5) * whole if kills < options.kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            done = finished(ckpt)
            print(f"kill {kills}: {done / 1e9:.3f} GB finished", flush=True)
            if not (ckpt / "manifest.json").exists():
                assert not is_checkpoint(ckpt)
                assert done >= most, "finished work was lost"
                most = done
                continue
            if done:  # between the manifest and the end: the same command tidies up
                continue
            # else after all of it, while the process was going
        else:
            assert process.returncode == 0, process.returncode
        assert is_checkpoint(ckpt)
        differences = verify(src, ckpt)
        assert not differences, differences
        ends += 1
        most = 0
        print(f"end {ends}: verified", flush=True)
        shutil.rmtree(ckpt)
    print(f"{kills} kills, {ends} conversions came to their end and verified", flush=True)


if __name__ == "__main__":
    main()

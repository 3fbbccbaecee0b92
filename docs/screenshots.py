"""What is shown of the program: pictures of the terminal and of the first page, and the outputs of the notebooks.

    python docs/screenshots.py [terminal] [page] [notebooks]

Terminal: the commands run in a pseudo-terminal with the model inside, and rich draws what they printed as SVG. Page:
the site is built, and Chromium, which must be there, takes the picture. Notebooks: they are run in place, and folders
of this machine are shortened in what they print. Needs the extras `docs` and `notebooks`.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH = 100
CHAT = ("/audio example:digits-4719", "Which digits are spoken?", "/reset", "/audio example:high-voice-306")
CHAT = (*CHAT, "Is the voice high or low?", "/quit")
GENERATE = ("generate", "--audio", "example:digits-4719", "Which digits are spoken?", "--json")
BATCH = ("batch", "qwen2audio_jax/embedded/examples", "--prompt", "Is this speech, a tone or noise?")


def in_a_terminal(command: Sequence[str], *, typed: Sequence[str], cache: Path) -> str:
    """What a command shows, with what is typed at each of its prompts."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        environment = {"JAX_PLATFORMS": "cpu", "QWEN2AUDIO_CACHE": str(cache), "COLUMNS": str(WIDTH), "TERM": "xterm"}
        os.execvpe(sys.executable, [sys.executable, "-m", "qwen2audio_jax", *command], {**os.environ, **environment})
    shown, lines = b"", list(typed)
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        shown += piece
        if lines and shown.endswith(b"> "):
            os.write(terminal, lines.pop(0).encode() + b"\n")
    os.waitpid(child, 0)
    return shown.decode().replace(str(ROOT), "~/qwen2audio").replace(str(cache), "~/.cache/qwen2audio_jax")


def draw(name: str, command: Sequence[str], shown: str) -> None:
    """An SVG of a terminal."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        words = [f'"{word}"' if " " in word else word for word in command]
        console.print(Text("$ " + " ".join(["qwen2audio", *words]), style="bold"))
        for line in shown.replace("\r\n", "\n").splitlines():
            console.print(Text.from_ansi(line.rsplit("\r", 1)[-1]))
    picture = console.export_svg(title="qwen2audio", unique_id=name)
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # nothing is fetched from elsewhere
    (IMAGES / f"{name}.svg").write_text(picture, encoding="utf-8")


def terminal() -> None:
    """A chat; a question with what is said meanwhile; a batch job."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        draw("generate", GENERATE, in_a_terminal(GENERATE, typed=(), cache=place / "cache"))
        draw("chat", ["chat"], in_a_terminal(["chat"], typed=CHAT, cache=place / "cache"))
        command = [*BATCH, "--output", str(place / "answers")]
        draw("batch", [*BATCH, "--output", "answers"], in_a_terminal(command, typed=(), cache=place / "cache"))


def page() -> None:
    """The first page of the documentation."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        raise SystemExit("Chromium is not installed: apt-get install --no-install-recommends chromium")
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--no-directory-urls"]
        subprocess.run([*build, "--site-dir", folder], cwd=ROOT, check=True)
        picture = IMAGES / "first-page.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1280,900"]
        subprocess.run(
            [browser, *options, f"--screenshot={picture}", f"file://{folder}/index.html"],
            check=True,
            stderr=subprocess.DEVNULL,
        )


def notebooks() -> None:
    """The outputs of the notebooks, of one run from the first cell to the last."""
    import nbformat
    from nbclient import NotebookClient

    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["QWEN2AUDIO_CACHE"] = cache
            client = NotebookClient(
                book, timeout=600, coalesce_streams=True, resources={"metadata": {"path": path.parent}}
            )
            client.execute()
            text = nbformat.writes(book)
            for folder, name in (
                (cache, "~/.cache/qwen2audio_jax"),
                (ROOT, "~/qwen2audio"),
                (tempfile.gettempdir() + "/", "TMP/"),
            ):
                text = text.replace(str(folder), name)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for what in sys.argv[1:] or ("terminal", "page", "notebooks"):
        {"terminal": terminal, "page": page, "notebooks": notebooks}[what]()

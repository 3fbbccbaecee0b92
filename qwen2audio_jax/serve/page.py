"""The page at `/`: files of the package, under a policy that lets a browser run and load nothing else."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qwen2audio_jax.serve.door import Door

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src blob:"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cache-Control": "no-cache",
}


def page_routes(door: Door) -> list[Route]:
    """A route for each of the page's files, by its name; a browser gets them without a key."""
    files = sorted(file for file in FOLDER.iterdir() if file.suffix in TYPES)
    return [
        Route(address, door.open(address, _sender(file)), methods=["GET"])
        for file in files
        for address in ["/" if file.name == "index.html" else f"/{file.name}"]
    ]


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=TYPES[file.suffix], headers=HEADERS)

    return send

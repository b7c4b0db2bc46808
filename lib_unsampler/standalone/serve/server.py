"""The page over HTTP, for this machine alone: what may be asked, by whom, and how much.

It listens on the loopback address. A page of another site that reaches it all the same, by a name that it had lead
here (DNS rebinding) or by a form or script that posts across sites, is refused by its Host and Origin.
"""

from __future__ import annotations

import json
import mimetypes
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ...page import shelf
from . import markup, work
from .markup import MOST_PICTURE, PICTURES, RESULTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FILES = {
    "/batch_unsampler.js": ROOT / "javascript/batch_unsampler.js",
    "/style.css": ROOT / "style.css",
    "/page.js": HERE / "page.js",
    "/page.css": HERE / "page.css",
}
SERVED = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".mp4": "video/mp4"}
SERVED[shelf.ENDING] = "application/octet-stream"
"""Results, by their ending."""

MOST_ASKED = 2**16
MOST_SENT = 4 * MOST_PICTURE // 3 + MOST_ASKED
"""Bytes of a question, and of a request with its picture (in base64, a third more than the file)."""
PATIENCE = 30.0
"""Seconds after which a connection that says nothing is closed."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RefusedError(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Server(ThreadingHTTPServer):
    """The page's server on the loopback address."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it would share a port that somebody has

    def __init__(self, port: int, jobs: work.Work) -> None:
        """Takes the port (0: any that is free).

        Raises:
            OSError: if somebody has it.
        """
        self.work = jobs
        super().__init__(("127.0.0.1", port), Handler)
        names = ("127.0.0.1", "localhost")
        self.hosts = {f"{name}:{self.server_port}" for name in names}
        self.hosts |= set(names) if self.server_port == 80 else set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a page that has gone."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version = "BatchUnsampler"
    sys_version = ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        """The page, its files, examples and results."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Questions, runs, interruptions."""
        self._answer(self._post)

    def _answer(self, act: Callable[[str], None]) -> None:
        try:
            path = self.path.split("?")[0]
            self._check_from(path)
            act(path)
        except RefusedError as error:
            self._send(error.status, "application/json", json.dumps({"error": str(error)}).encode())
        except work.Interrupted:
            self.close_connection = True  # the page has gone

    def _check_from(self, path: str) -> None:
        """Refuses what does not come from a page of this server, or from its user's own hand."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            raise RefusedError(HTTPStatus.FORBIDDEN, "this server answers under its own address alone")
        origins = self.headers.get_all("Origin", [])
        if (origins or self.command == "POST") and origins not in [[f"http://{host}"] for host in self.server.hosts]:
            raise RefusedError(HTTPStatus.FORBIDDEN, "this server answers its own page alone")
        if path != "/" and self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise RefusedError(HTTPStatus.FORBIDDEN, "this server answers its own page alone")

    def _get(self, path: str) -> None:
        if path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", _page())
        elif path in FILES:
            kind = mimetypes.types_map[FILES[path].suffix]
            self._send(HTTPStatus.OK, f"{kind}; charset=utf-8", FILES[path].read_bytes())
        elif path.startswith(PICTURES) and path.removeprefix(PICTURES) in work.EXAMPLES:
            data = work.example(path.removeprefix(PICTURES))
            self._send(HTTPStatus.OK, "image/jpeg" if data.startswith(b"\xff\xd8") else "image/png", data)
        elif path.startswith(RESULTS):
            self._send_result(unquote(path.removeprefix(RESULTS), errors="replace"))
        else:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _send_result(self, name: str) -> None:
        """A file of the folder of results, and nothing else."""
        file = shelf.place(self.server.work.folder, name)
        hidden = any(part.startswith(".") for part in name.split("/"))
        if file is None or hidden or file.suffix not in SERVED:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such result")
        with file.open("rb") as opened:
            self._begin(HTTPStatus.OK, SERVED[file.suffix], {"Content-Length": str(file.stat().st_size)})
            shutil.copyfileobj(opened, self.wfile)

    def _post(self, path: str) -> None:
        if path == "/ask":
            answer = self.server.work.answer(self._body(MOST_ASKED).decode(errors="replace"))
            self._send(HTTPStatus.OK, "application/json", json.dumps(answer).encode())
        elif path == "/run":
            self._run(self._json(MOST_SENT))
        elif path == "/interrupt":
            self.server.work.interrupt(str(self._json(MOST_ASKED).get("run")))
            self._send(HTTPStatus.OK, "application/json", b"{}")
        else:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _run(self, request: Mapping[str, Any]) -> None:
        """A run, told line by line as JSON."""
        if not isinstance(request.get("values"), dict) or not isinstance(request.get("host"), dict):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "values, host and picture are needed")
        self._begin(HTTPStatus.OK, "application/x-ndjson", {})

        def tell(line: Mapping[str, Any]) -> None:
            try:
                self.wfile.write(json.dumps(line).encode() + b"\n")
            except OSError:
                raise work.Interrupted from None

        self.server.work.run(request, tell)

    def _json(self, most: int) -> dict[str, Any]:
        try:
            read = json.loads(self._body(most))
        except (ValueError, RecursionError):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "not JSON") from None
        if not isinstance(read, dict):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "not names and values")
        return read

    def _body(self, most: int) -> bytes:
        """The request's body: JSON, which no form of another site can send, of at most so many bytes."""
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "only application/json is read")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "the body's length must be said")
        if len(length) > 12 or int(length) > most:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {most} bytes are read")
        return self.rfile.read(int(length))

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self._begin(status, kind, {"Content-Length": str(len(data))})
        self.wfile.write(data)

    def _begin(self, status: HTTPStatus, kind: str, more: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a terminal is no access log."""


@cache
def _page() -> bytes:
    return markup.page().encode()

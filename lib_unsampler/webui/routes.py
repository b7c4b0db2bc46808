"""What the extension adds to the WebUI's API: its latents files and animations, for who cannot read the server's disk.

The WebUI's own guards hold here too: the names and passwords of its API (``--api-auth``), and where it has none the
login of its page (``--gradio-auth``), which guards the same files there.
"""

from __future__ import annotations

import mimetypes
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ..page import shelf

LATENTS = "/unsampler/v1/latents"
ANIMATIONS = "/unsampler/v1/animations"
PIECE = 2**18
"""Bytes that are read at a time."""


def add(
    app: Any, folder: Callable[[], Path], accounts: Mapping[str, str], films: Callable[[], Path] | None = None
) -> None:
    """Adds the routes to the WebUI's application.

    Arguments:
        app: The FastAPI application.
        folder: Where the latents files are now.
        accounts: Passwords of the API by user name; without any the page's login is asked for, if it has one.
        films: Where the animations are now, if not there too.
    """
    films = films or folder

    def authenticated(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:
        known = accounts.get(given.username, "")
        right = secrets.compare_digest(given.password.encode(), known.encode())
        if given.username not in accounts or not right:
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    def logged_in(request: Request) -> None:
        given = [value for name, value in request.cookies.items() if name.startswith("access-token")]  # gradio's names
        if getattr(app, "auth", None) is not None and not any(app.tokens.get(token) for token in given):
            raise HTTPException(401, "Not authenticated: log in at the page, or with POST /login")

    def latents() -> list[str]:
        return shelf.names(folder())

    def latents_file(name: str, request: Request) -> Response:
        return _answer(shelf.find, folder(), name, request)

    def animations() -> list[str]:
        return shelf.film_names(films())

    def animation(name: str, request: Request) -> Response:
        return _answer(shelf.find_film, films(), name, request)

    common = {"dependencies": [Depends(authenticated if accounts else logged_in)]}
    for path, listed, one in ((LATENTS, latents, latents_file), (ANIMATIONS, animations, animation)):
        for method in ("GET", "HEAD"):
            told = {"methods": [method], "include_in_schema": method == "GET", **common}
            app.add_api_route(path, listed, response_model=list, **told)
            app.add_api_route(path + "/{name:path}", one, response_model=None, **told)


def _answer(find: Callable[[Path, str], Path], folder: Path, name: str, request: Request) -> Response:
    """A file on a shelf, or the part of it that is asked for."""
    try:
        file = find(folder, name)
        opened = file.open("rb")
    except (ValueError, OSError) as error:
        text = str(error).encode(errors="backslashreplace").decode()  # a link may lead to a name that is no text
        raise HTTPException(404, text) from None
    about = os.fstat(opened.fileno())
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Encoding": "identity",  # else A1111 compresses noise, and a part would be one of another whole
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(file.name, errors='replace')}",
        "ETag": f'"{about.st_mtime_ns:x}-{about.st_size:x}"',
        "Last-Modified": formatdate(about.st_mtime, usegmt=True),
    }
    same = request.headers.get("if-range") in (None, headers["ETag"], headers["Last-Modified"])
    part = _part(request.headers.get("range", ""), about.st_size) if same and request.method == "GET" else None
    if part is not None and not part:
        opened.close()
        told = {"Content-Range": f"bytes */{about.st_size}"}
        return JSONResponse({"detail": f"the file has no such part: it is {about.st_size} bytes long"}, 416, told)
    wanted = range(about.st_size) if part is None else part
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{about.st_size}"
    headers["Content-Length"] = str(len(wanted))
    pieces = _pieces(opened, wanted if request.method == "GET" else range(0))
    kind = mimetypes.types_map.get(file.suffix, "application/octet-stream")
    return StreamingResponse(pieces, 200 if part is None else 206, headers, kind)


def _part(asked: str, size: int) -> range | None:
    """The bytes that a Range header asks for; empty where there are none such, None for the whole file.

    What is not one range of bytes may be answered with the whole file (RFC 9110, 14.2).
    """
    match = re.fullmatch(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", asked, re.ASCII)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(size, int(last) + 1) if last else size)


def _pieces(opened: BinaryIO, wanted: range) -> Iterator[bytes]:
    with opened:
        opened.seek(wanted.start)
        left = len(wanted)
        while left and (piece := opened.read(min(PIECE, left))):
            left -= len(piece)
            yield piece

"""What the extension adds to the WebUI's API: the latents files, for who cannot read the server's disk.

The WebUI's own user names and passwords (``--api-auth``) hold here too.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import Depends, HTTPException
from fastapi.responses import FileResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ..core.trajectory import TrajectoryError
from . import shelf

LATENTS = "/unsampler/v1/latents"


def add(app: Any, folder: Callable[[], Path], accounts: Mapping[str, str]) -> None:
    """Adds the routes to the WebUI's application.

    Arguments:
        app: The FastAPI application.
        folder: Where the latents files are now.
        accounts: Passwords by user name; none leaves the API open, as the WebUI's is then.
    """

    def authenticated(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:
        known = accounts.get(given.username, "")
        right = secrets.compare_digest(given.password.encode(), known.encode())
        if given.username not in accounts or not right:
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    def listed() -> list[str]:
        return shelf.names(folder())

    def latents(name: str) -> FileResponse:
        try:
            file = shelf.find(folder(), name)
        except TrajectoryError as error:
            raise HTTPException(404, str(error)) from None
        return FileResponse(file, media_type="application/octet-stream", filename=file.name)

    dependencies = [Depends(authenticated)] if accounts else []
    common = {"methods": ["GET"], "dependencies": dependencies}
    app.add_api_route(LATENTS, listed, response_model=list, **common)
    app.add_api_route(LATENTS + "/{name:path}", latents, response_model=None, **common)

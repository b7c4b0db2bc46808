"""The routes and the shelves behind them: any name and any folder is answered, files are streamed in parts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doubled import pixels
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.middleware.gzip import GZipMiddleware

from lib_unsampler.core.trajectory import TrajectoryError
from lib_unsampler.page import shelf
from lib_unsampler.webui import routes

FORMATS = {"gif": "image/gif", "webp": "image/webp", "apng": "image/png", "mp4": "video/mp4"}


@pytest.fixture
def client(host: SimpleNamespace) -> TestClient:
    """The routes in an application that compresses as A1111's does."""
    app = FastAPI()
    app.add_middleware(GZipMiddleware, minimum_size=1000)
    routes.add(app, lambda: host.out, {}, lambda: host.out)
    return TestClient(app)


@pytest.fixture
def kept(host: SimpleNamespace) -> str:
    """The name of a latents file in the output folder, in a folder of its own."""
    _, processed = host.run({"output": ["latents"]})
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    (host.out / "day").mkdir()
    (host.out / name).rename(host.out / "day" / name)
    return f"day/{name}"


def odd_files(folder: Path) -> None:
    """What a folder may hold beside our files."""
    (folder / "self.safetensors").symlink_to("self.safetensors")
    (folder / "one.safetensors").symlink_to("two.safetensors")
    (folder / "two.safetensors").symlink_to("one.safetensors")
    (folder / "loop").symlink_to(".")
    (folder / "around").symlink_to("around")
    (folder / "nowhere.safetensors").symlink_to("missing.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    for name in ("self-unsampling.gif", "self-unsampling.mp4"):
        (folder / name).symlink_to(name)
    with open(os.fsencode(folder) + b"/\xff\xfe.safetensors", "wb") as file:
        file.write(b"no text")


ODD_NAMES = {
    "too long": "x" * 300 + ".safetensors",
    "a path too long": "x/" * 3000 + "x.safetensors",
    "a lone surrogate": "\ud800.safetensors",
    "a byte that is no text": "\udcff\udcfe.safetensors",
    "a NUL": "a\0.safetensors",
    "a NUL after it": "{kept}\0",
    "up and down": "day/../{kept}",
    "up out of it": "../out/{kept}",
    "here": "./{kept}",
    "twice": "day//{file}",
    "from the root": "/{kept}",
    "a folder": "folder.safetensors",
    "a pipe": "pipe.safetensors",
    "a loop": "self.safetensors",
    "a loop of two": "one.safetensors",
    "behind a loop": "around/{kept}",
    "a dead link": "nowhere.safetensors",
    "nothing": "",
    "only dots": "..",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux allows in names")
@pytest.mark.parametrize("kind", ODD_NAMES)
def test_a_name_that_is_none_is_a_clear_404(host: SimpleNamespace, client: TestClient, kept: str, kind: str) -> None:
    odd_files(host.out)
    name = ODD_NAMES[kind].format(kept=kept, file=kept.partition("/")[2])
    with pytest.raises(TrajectoryError, match="is not a latents file"):
        shelf.find(host.out, name)
    with pytest.raises(shelf.NotOnShelfError, match="is not an animation"):
        shelf.find_film(host.out, name)
    if kind not in ("nothing", "only dots", "a lone surrogate", "a byte that is no text"):  # no URL says those
        for route in (routes.LATENTS, routes.ANIMATIONS):
            quoted = name.replace("/", "%2F").replace(".", "%2E").replace("\0", "%00")
            reply = client.get(f"{route}/{quoted}")
            assert reply.status_code == 404 and " is not a" in reply.json()["detail"] and len(reply.text) < 2000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux allows in names")
def test_the_list_is_whole_whatever_else_is_there(host: SimpleNamespace, client: TestClient, kept: str) -> None:
    _, processed = host.run({"output": ["animation"]})
    film = processed.extra_generation_params["Unsampler animations names"]
    odd_files(host.out)
    (host.out / "link.safetensors").symlink_to(kept)
    assert client.get(routes.LATENTS).json() == [kept] == shelf.names(host.out)
    assert client.get(routes.ANIMATIONS).json() == film == shelf.film_names(host.out)
    assert shelf.names(host.out / "missing") == shelf.film_names(host.out / "missing") == []


def test_a_name_with_dots_within_is_a_name(host: SimpleNamespace, client: TestClient, kept: str) -> None:
    data = (host.out / kept).read_bytes()
    for name in ("a..b.safetensors", "..hidden.safetensors", "ünï cødé 日本.safetensors", "50%.safetensors"):
        (host.out / name).write_bytes(data)
        reply = client.get(f"{routes.LATENTS}/{name.replace('%', '%25')}")
        assert reply.content == data and name in client.get(routes.LATENTS).json()


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=0-99", slice(0, 100)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=-99999999", slice(0, None)),
        ("bytes=5-99999999999999999", slice(5, None)),
        ("bytes= 7-8 ", slice(7, 9)),
    ],
)
def test_a_part_of_a_file(host: SimpleNamespace, client: TestClient, kept: str, asked: str, part: slice) -> None:
    data = (host.out / kept).read_bytes()
    reply = client.get(f"{routes.LATENTS}/{kept}", headers={"Range": asked})
    first, last, _ = part.indices(len(data))
    assert reply.status_code == 206 and reply.content == data[part]
    assert reply.headers["content-range"] == f"bytes {first}-{last - 1}/{len(data)}"
    assert int(reply.headers["content-length"]) == last - first and reply.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0", "bytes=99999999-999999999"])
def test_a_part_that_is_not_there(client: TestClient, host: SimpleNamespace, kept: str, asked: str) -> None:
    reply = client.get(f"{routes.LATENTS}/{kept}", headers={"Range": asked})
    size = (host.out / kept).stat().st_size
    assert reply.status_code == 416 and reply.headers["content-range"] == f"bytes */{size}"
    assert str(size) in reply.json()["detail"]


@pytest.mark.parametrize(
    "asked",
    ["", "bytes=", "bytes=-", "bytes=5-3", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "bytes=" + "9" * 5000 + "-"],
)
def test_what_is_no_part_gets_the_whole(client: TestClient, host: SimpleNamespace, kept: str, asked: str) -> None:
    reply = client.get(f"{routes.LATENTS}/{kept}", headers={"Range": asked} if asked else {})
    assert reply.status_code == 200 and reply.content == (host.out / kept).read_bytes()
    assert reply.headers["content-disposition"].endswith(kept.partition("/")[2])


def test_a_part_of_a_file_that_has_changed_is_the_whole(host: SimpleNamespace, client: TestClient, kept: str) -> None:
    url, wanted = f"{routes.LATENTS}/{kept}", {"Range": "bytes=0-9"}
    first = client.get(url, headers=wanted)
    for tag in (first.headers["etag"], first.headers["last-modified"]):
        assert client.get(url, headers={**wanted, "If-Range": tag}).status_code == 206
    data = (host.out / kept).read_bytes()
    os.utime(host.out / kept, (1, 1))
    again = client.get(url, headers={**wanted, "If-Range": first.headers["etag"]})
    assert again.status_code == 200 and again.content == data


@pytest.mark.parametrize("accounts", [{}, {"ann": "one"}])
def test_head_tells_what_get_would_send(host: SimpleNamespace, kept: str, accounts: dict[str, str]) -> None:
    app = FastAPI()
    routes.add(app, lambda: host.out, accounts)
    client, right = TestClient(app), ("ann", "one") if accounts else None
    for path in (routes.LATENTS, f"{routes.LATENTS}/{kept}", routes.ANIMATIONS):
        got, told = client.get(path, auth=right), client.head(path, auth=right)
        assert told.status_code == 200 and told.headers == got.headers
        if accounts:
            assert client.head(path).status_code == 401
    assert client.head(f"{routes.LATENTS}/no.safetensors", auth=right).status_code == 404
    assert client.head(f"{routes.LATENTS}/{kept}", auth=right).content == b""
    paths = app.openapi()["paths"]
    assert list(paths[routes.LATENTS]) == ["get"]


@pytest.mark.parametrize("accounts", [{}, {"ann": "two"}])
def test_the_page_s_login_guards_where_the_api_has_no_password(
    host: SimpleNamespace, kept: str, accounts: dict[str, str]
) -> None:
    """The hosts give their page's application, whose login is gradio's own."""
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks() as demo:
        gradio.Textbox()
    demo.auth = [("ann", "one")]
    app = gradio.routes.App.create_app(demo)
    routes.add(app, lambda: host.out, accounts)
    paths = [routes.LATENTS, f"{routes.LATENTS}/{kept}", routes.ANIMATIONS, f"{routes.LATENTS}/no.safetensors"]
    client = TestClient(app, base_url="https://testserver")
    for method in ("GET", "HEAD"):
        assert [client.request(method, path).status_code for path in paths] == [401] * 4
        forged = {"Cookie": "access-token=x; access-token-unsecure="}
        assert [client.request(method, path, headers=forged).status_code for path in paths] == [401] * 4
    assert client.post("/login", data={"username": "ann", "password": "two"}).status_code == 400
    assert client.get(paths[0]).status_code == 401
    assert client.post("/login", data={"username": "ann", "password": "one"}).status_code == 200
    by_cookie = [client.get(path).status_code for path in paths]
    assert by_cookie == ([401] * 4 if accounts else [200, 200, 200, 404])
    if accounts:
        assert [client.get(path, auth=("ann", "two")).status_code for path in paths] == [200, 200, 200, 404]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.one_of(3)
def test_an_animation_is_had_by_its_name(host: SimpleNamespace, tmp_path: Path, form: str, elsewhere: bool) -> None:
    if form == "mp4":
        pytest.importorskip("av")
    from lib_unsampler.webui.host import page

    if elsewhere:
        host.shared.opts.batch_unsampler_animation_folder = str(tmp_path / "moving")
    app = FastAPI()
    routes.add(app, page.output_folder, {}, page.animation_folder)
    client = TestClient(app)
    settings = {"output": ["animation", "frames", "contact sheet", "sigma curve", "latents"], "format": form}
    _, processed = host.run(settings, batch_size=2, n_iter=2, is_api=True)
    names = processed.extra_generation_params["Unsampler animations names"]
    assert len(names) == 4 and sorted(client.get(routes.ANIMATIONS).json()) == sorted(names)
    for name, shown in zip(names, processed.images):
        reply = client.get(f"{routes.ANIMATIONS}/{name}")
        assert reply.content == (page.animation_folder() / name).read_bytes()
        assert reply.headers["content-type"] == FORMATS[form]
        assert reply.content == __import__("base64").b64decode(shown)
    _, unsaved = host.run(settings, do_not_save_samples=True)
    assert unsaved.extra_generation_params["Unsampler animations names"] == []
    assert len(client.get(routes.ANIMATIONS).json()) == 4


def test_no_other_picture_is_had_as_an_animation(host: SimpleNamespace, client: TestClient, tmp_path: Path) -> None:
    _, processed = host.run({"output": ["animation", "frames"], "format": "apng"})
    (film,) = processed.extra_generation_params["Unsampler animations names"]
    data, still = (host.out / film).read_bytes(), next(host.out.glob("*-z000.png")).read_bytes()
    others = {"cat.png": data, "cat-unsampling.png": still, "x-unsampling.gif": b"MZ", "x-unsampling.svg": b"<svg>"}
    for name, content in others.items():
        (host.out / name).write_bytes(content)
    (tmp_path / "private-unsampling.png").write_bytes(data)
    (host.out / "link-unsampling.png").symlink_to(tmp_path / "private-unsampling.png")
    assert client.get(routes.ANIMATIONS).json() == [film]
    for name in [*others, "link-unsampling.png", next(host.out.glob("*-z000.png")).name]:
        assert client.get(f"{routes.ANIMATIONS}/{name}").status_code == 404


@pytest.mark.parametrize(
    "name", ["day/../x.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", "a\0.safetensors"]
)
def test_a_request_for_such_a_file_is_refused_by_name(host: SimpleNamespace, name: str) -> None:
    with pytest.raises(Exception, match="trajectory: .* is not a latents file") as caught:
        host.run({"output": ["frames"], "trajectory": name})
    assert caught.value.status_code == 422 and str(caught.value).encode()


def test_an_upload_to_a_shelf_with_a_loop(host: SimpleNamespace, kept: str, tmp_path: Path) -> None:
    (host.out / "self.safetensors").symlink_to("self.safetensors")
    (tmp_path / "mine.safetensors").write_bytes((host.out / kept).read_bytes())
    name = shelf.take(host.out, tmp_path / "mine.safetensors")
    assert set(shelf.names(host.out)) == {kept, name}
    again: Any = host.run({"output": ["frames"], "trajectory": name})[1]
    assert pixels(again) and len(again.images) == 9

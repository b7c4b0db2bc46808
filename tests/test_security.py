"""What is promised to who runs this on a machine that others may ask: no code of theirs, no file but ours, no size."""

from __future__ import annotations

import ast
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib_unsampler.standalone import reading
from lib_unsampler.webui import routes

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "lib_unsampler").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "install.py"])
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "yaml", "ctypes", "pty", "telnetlib", "ftplib"}
"""What runs or loads whatever it is given."""
CALLS = {("", name) for name in ("eval", "exec", "compile", "__import__")}
CALLS |= {("os", name) for name in ("system", "popen", "startfile", "spawnl", "spawnv", "execv", "execvp", "execl")}
CALLS |= {("torch", "load"), ("np", "load"), ("numpy", "load"), ("importlib", "reload")}


def starts_programs(path: Path) -> bool:
    """The installer starts pip, the benchmarks start git and themselves: no word of a request comes there."""
    return path.name == "install.py" or path.parent.name == "bench"


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def called(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """Every call as (owner, name): ``torch.load`` is ("torch", "load")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else "?"
                yield owner, function.attr, node
            elif isinstance(function, ast.Name):
                yield "", function.id, node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_eval_no_shell(path: Path) -> None:
    tree = parsed(path)
    assert not MODULES & set(imported(tree))
    assert "subprocess" not in set(imported(tree)) or starts_programs(path)
    for owner, name, node in called(tree):
        assert (owner, name) not in CALLS, f"{owner}.{name}, line {node.lineno}"
        shell = {word.arg: word.value for word in node.keywords}.get("shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False)


def test_the_check_sees_what_it_forbids() -> None:
    bad = ast.parse(
        "import pickle\nfrom marshal import loads\neval('1')\nos.system('x')\ntorch.load(f)\nx.run(shell=True)"
    )
    assert {"pickle", "marshal"} <= set(imported(bad))
    assert {("", "eval"), ("os", "system"), ("torch", "load")} <= {(owner, name) for owner, name, _ in called(bad)}


@pytest.mark.parametrize("given", [None, ("user", "wrong"), ("nobody", "secret"), ("user", ""), ("", "secret")])
@pytest.mark.parametrize(
    "path", [f"{base}{more}" for base in (routes.LATENTS, routes.ANIMATIONS) for more in ("", "/x")]
)
def test_every_route_asks_for_the_api_s_password(path: str, given: tuple[str, str] | None, tmp_path: Path) -> None:
    app = FastAPI()
    routes.add(app, lambda: tmp_path, {"user": "secret"})
    client = TestClient(app)
    for method in ("GET", "HEAD"):
        assert client.request(method, path, auth=given).status_code == 401
        assert client.request(method, path, auth=("user", "secret")).status_code in (200, 404)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BOMBS = {
    "pixels": png(60000, 60000),
    "one row": png(2**31 - 1, 1),
    "text": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 10**7))),
    "more pixels than data": png(12000, 12000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_that_is_more_than_it_seems_is_refused(kind: str, tmp_path: Path) -> None:
    assert len(BOMBS[kind]) < 20_000
    (tmp_path / "bomb.png").write_bytes(BOMBS[kind])
    with pytest.raises(reading.UnreadableError, match="not a readable picture"):
        reading.load_picture(tmp_path / "bomb.png", 64, print)

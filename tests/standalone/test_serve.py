"""The page's server: who is answered, what is served, how runs wait and end; over HTTP as a client sees it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lib_unsampler.core import trajectory
from lib_unsampler.settings import OUTPUTS, surface_fields
from lib_unsampler.standalone.serve import server, work

ROOT = Path(__file__).resolve().parents[2]
OWN = {"sampler": "euler", "scheduler": "karras", "model": "gaussian", "seed": "5", "steps": "6", "cfg_scale": "1"}
OWN |= {"denoising_strength": "0.6", "size": "24", "positive": "", "negative": "", "width": "24", "height": "18"}
VALUES = {f.name: list(f.default) if type(f.default) is tuple else f.default for f in surface_fields("host")}


class Client:
    """Talks to one server as its own page does, unless it is told to say something else."""

    def __init__(self, served: server.Server) -> None:
        self.port, self.folder = served.server_port, served.work.folder
        self.host = f"127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> tuple[int, dict, bytes]:
        said = {"Host": self.host}
        if method == "POST":
            said |= {"Origin": f"http://{self.host}", "Content-Type": "application/json"}
        said |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        for name, value in said.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        answered = reply.status, dict(reply.getheaders()), reply.read()
        connection.close()
        return answered

    def post(self, path: str, told: Any, **headers: str | None) -> tuple[int, list[Any]]:
        status, _, data = self.ask("POST", path, json.dumps(told).encode(), **headers)
        return status, [json.loads(line) for line in data.splitlines()]

    def run(self, values: dict[str, Any] | None = None, picture: Any = None, **own: Any) -> list[Any]:
        status, lines = self.post("/run", request(values, picture, **own))
        assert status == 200
        return lines


def request(values: dict[str, Any] | None = None, picture: Any = None, **own: Any) -> dict[str, Any]:
    picture = {"example": "cat"} if picture is None else picture
    return {"values": {**VALUES, **(values or {})}, "host": {**OWN, **own}, "picture": picture}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with server.Server(0, work.Work(tmp_path_factory.mktemp("results"))) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Client(served)
        served.shutdown()
        thread.join()
        served.work.close()


# Who is answered


def test_it_listens_on_this_machine_alone(client: Client) -> None:
    listening = Path("/proc/net/tcp")
    if not listening.exists():
        pytest.skip("no /proc/net/tcp here")
    rows = [line.split()[1:4] for line in listening.read_text().splitlines()[1:]]
    assert [here for here, _, state in rows if state == "0A" and here.endswith(f":{client.port:04X}")] == [
        f"0100007F:{client.port:04X}"
    ]


PATHS = ("/", "/page.js", "/batch_unsampler.js", "/examples/cat", "/results/00001/animation-00001.gif")
HOSTS = ("evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", "", None)


@pytest.mark.parametrize("host", HOSTS)
def test_a_name_that_was_led_here_is_not_answered(client: Client, host: str | None) -> None:
    """DNS rebinding: the browser says the attacker's name as Host."""
    name = host and host.format(port=client.port)
    for path in PATHS:
        assert client.ask("GET", path, Host=name)[0] == 403
    for path in ("/ask", "/run", "/interrupt"):
        origin = f"http://{name}"
        assert client.ask("POST", path, b"{}", Host=name, Origin=origin)[0] == 403


def test_two_hosts_are_none(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port)) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nHost: {client.host}\r\nHost: evil.example\r\n\r\n".encode())
        assert b" 403 " in raw.recv(200).splitlines()[0]


ORIGINS = ("http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1", "http://127.0.0.1", None)


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_of_another_site_cannot_post(client: Client, origin: str | None) -> None:
    said = origin and origin.format(port=client.port)
    before = sorted(client.folder.iterdir())
    for path in ("/ask", "/run", "/interrupt"):
        assert client.ask("POST", path, json.dumps(request()).encode(), Origin=said)[0] == 403
    if said:
        assert client.ask("GET", "/", Origin=said)[0] == 403
    assert sorted(client.folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_form_can_send_is_not_read(client: Client, kind: str | None) -> None:
    assert client.ask("POST", "/run", json.dumps(request()).encode(), Content_Type=kind)[0] == 415


def test_other_sites_cannot_show_what_is_here(client: Client) -> None:
    for site in ("cross-site", "same-site"):
        assert client.ask("GET", "/examples/cat", Sec_Fetch_Site=site)[0] == 403
        assert client.ask("GET", "/", Sec_Fetch_Site=site)[0] == 200  # a link to the page itself
    _, headers, _ = client.ask("GET", "/")
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert not [name for name in headers if name.startswith("Access-Control")]


def test_localhost_is_this_machine_too(client: Client) -> None:
    host = f"localhost:{client.port}"
    assert client.ask("GET", "/", Host=host)[0] == 200
    assert client.post("/interrupt", {"run": "none"}, Host=host, Origin=f"http://{host}") == (200, [{}])


# What is served


@pytest.fixture(scope="module")
def made(client: Client) -> dict[str, Any]:
    *_, last = client.run({"output": ["frames", "animation", "latents", "init"]})
    return last


def test_results_are_served(client: Client, made: dict[str, Any]) -> None:
    for name in made["images"]:
        status, headers, data = client.ask("GET", f"/results/{name}")
        assert status == 200 and data == (client.folder / name).read_bytes()
        assert headers["Content-Type"] in ("image/gif", "image/png")
    (latents,) = made["result"]["extra_generation_params"]["Unsampler latents names"]
    assert client.ask("GET", f"/results/{latents}")[2] == (client.folder / latents).read_bytes()


OUTSIDE = (
    *("../secret.png", "%2e%2e/secret.png", "..%2fsecret.png", "%2e%2e%2fsecret.png", "00001/../../secret.png"),
    *(
        "/{secret}",
        "{secret}",
        "//{secret}",
        "%2f{secret}",
        "..%5csecret.png",
        "..\\secret.png",
        "%252e%252e/secret.png",
    ),
    *("link.png", "linked/secret.png", "loop.png", ".hidden.png", "00001/.hidden.png", "other.html", "other.py"),
    *(
        "",
        ".",
        "..",
        "00001",
        "00001/",
        "%00",
        "a%00.png",
        "%ff.png",
        "x" * 5000 + ".png",
        "00001//animation-00001.gif",
    ),
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_else_is(client: Client, made: dict[str, Any], name: str) -> None:
    secret = client.folder.parent / "secret.png"
    if not secret.exists():
        Image.new("RGB", (8, 8), "red").save(secret)
        (client.folder / "link.png").symlink_to(secret)
        (client.folder / "linked").symlink_to(secret.parent)
        (client.folder / "loop.png").symlink_to(client.folder / "loop.png")
        for hidden in (".hidden.png", "00001/.hidden.png", "other.html", "other.py"):
            (client.folder / hidden).write_bytes(secret.read_bytes())
    status, _, data = client.ask("GET", f"/results/{name.format(secret=secret)}")
    assert status == 404 and secret.read_bytes() not in data


def test_no_other_path_is_there(client: Client) -> None:
    for path in (
        "/results",
        "/examples/",
        "/examples/../page.js",
        "/page.py",
        "/static/page.js",
        "http://evil.example/",
    ):
        assert client.ask("GET", path)[0] == 404
    assert client.post("/results/x", {})[0] == 404
    assert client.ask("PUT", "/results/x.png", b"x")[0] == 501


# What is read


def test_there_are_limits(client: Client) -> None:
    too_much = str(server.MOST_SENT + 1)
    with socket.create_connection(("127.0.0.1", client.port)) as raw:
        head = f"POST /run HTTP/1.1\r\nHost: {client.host}\r\nOrigin: http://{client.host}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {too_much}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(200).splitlines()[0]  # before any of it was sent
    assert client.ask("POST", "/ask", b" " * (server.MOST_ASKED + 1))[0] == 413
    for length in ("-1", "1_0", "9" * 5000, "x"):
        assert client.ask("POST", "/ask", None, Content_Length=length)[0] in (411, 413)
    assert client.ask("POST", "/ask", None)[0] == 411


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"[" * 60000, b'{"values": [], "host": {}}', b"\xff"])
def test_what_is_no_request_is_said_to_be_none(client: Client, body: bytes) -> None:
    assert client.ask("POST", "/run", body)[0] == 400


PICTURES: list[tuple[Any, str]] = [
    ({"example": "../cat"}, "not an example picture"),
    ({"data": "no base64!"}, "not base64"),
    ({"data": base64.b64encode(b"no picture").decode()}, "the picture: not a readable picture"),
    ({"data": ""}, "the picture: not a readable picture"),
    ({}, "no picture"),
    ("cat", "no picture"),
]


@pytest.mark.parametrize(("picture", "said"), PICTURES)
def test_a_bad_picture_is_said_to_be_bad(client: Client, picture: Any, said: str) -> None:
    before = sorted(client.folder.iterdir())
    (error,) = client.run(picture=picture)[-1]["errors"]
    assert said in error["text"] and str(client.folder.parent) not in error["text"]
    assert sorted(client.folder.iterdir()) == before


BAD: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"steps": "many"}, {}, "steps", "'many' is not automatic (0)"),
    ({"output": []}, {}, "output", "is not any of"),
    ({"output": ["comfyui"]}, {}, "output", "comfyui does not go with the embedded models"),
    ({"output": ["guide"], "guide_weight": "map"}, {}, "guide_weight", "needs an inpaint mask"),
    ({"mode": "replay"}, {}, "mode", "adds no noise, which mode replay needs"),
    ({"trajectory": "../x.safetensors"}, {}, "trajectory", "is not a latents file"),
    ({}, {"sampler": "eulr"}, "mode", "is not one of"),
    ({}, {"model": "gaussian-flow", "scheduler": "vp"}, "", "'vp' reaches sigma 152"),
    ({"output": ["init"]}, {"positive": "a cat"}, "positive", "is not a prompt of the embedded models"),
    ({}, {"seed": "-1"}, "", "seed: '-1' is not a whole number"),
    ({}, {"steps": "0"}, "steps", "'0' is not a number from 1 to 1000"),
    ({}, {"denoising_strength": "nan"}, "", "denoising strength: 'nan' is not a number from 0 to 1"),
    ({}, {"size": "4000"}, "", "size: '4000' is not a number from 16 to 2048"),
    ({"steps": 10000}, {"width": "2048", "height": "2048"}, "steps", "megapixels"),
]


@pytest.mark.parametrize(("values", "own", "field", "said"), BAD, ids=str)
def test_what_is_refused_is_refused_before_and_then(
    client: Client, values: dict[str, Any], own: dict[str, Any], field: str, said: str
) -> None:
    asked = request(values, **own)
    _, (answer,) = client.post("/ask", {"id": 1, "kind": "ask", "wants": ["check"], **asked})
    before = answer["check"]["errors"] if "check" in answer else [{"field": "", "text": answer["error"]}]
    *_, last = client.run(values, **own)
    assert [e for e in last["errors"] if e["field"] == field and said in e["text"]], last
    assert any(said in error["text"] for error in before), before


# What is made

MODES, FILMS = ("noise", "invert", "replay"), ("noising", "sampling", "both")


@pytest.mark.parametrize(("output", "mode"), list(product(OUTPUTS, MODES)))
def test_what_is_not_refused_is_made(client: Client, output: str, mode: str) -> None:
    for film in FILMS if output in ("init", "guide") else FILMS[:1]:
        wanted = ["frames", output] if output in ("init", "guide") else [output]
        values = {"output": wanted, "mode": mode, "film": film, "noise": "shared", "report": mode == "invert"}
        asked = request(values, sampler="euler_ancestral" if mode == "replay" else "euler", size="16", steps="4")
        _, (answer,) = client.post("/ask", {"id": 1, "kind": "ask", "wants": ["schedule", "check"], **asked})
        _, lines = client.post("/run", asked)
        if answer["check"]["errors"]:
            assert lines[-1]["errors"] == answer["check"]["errors"]
            continue
        result, images = lines[-1]["result"], lines[-1]["images"]
        told = result["extra_generation_params"]
        notes = told["Unsampler images"]
        assert all((client.folder / name).is_file() for name in images), (output, mode, film)
        kinds = {"frames": "frame", "strength sweep": "sweep", "init": "frame", "guide": "frame"}
        assert kinds.get(output, output) in {note["kind"] for note in notes} or output == "latents"
        assert len(told["Unsampler latents names"]) == (output == "latents")
        assert ("report" in {note["kind"] for note in notes}) == (mode == "invert")
        frames = [name for note, name in zip(notes, images) if note["kind"] == "frame"]
        if frames:
            folder = (client.folder / frames[0]).parent
            assert sorted(f.name for f in folder.iterdir()) == [Path(name).name for name in frames]
        sigmas = answer["schedule"]["sigmas"]
        assert all(note["sigma"] == sigmas[note["step"]] for note in notes if note.get("step") is not None)


def test_the_level_is_img2img_s_start(client: Client) -> None:
    *_, last = client.run({"output": ["latents", "init"]}, steps="20", denoising_strength="0.6")
    told = last["result"]["extra_generation_params"]
    saved = trajectory.load(client.folder / told["Unsampler latents names"][0])
    assert saved.start == 20 - int(0.6 * 20) - 1 and saved.sigmas.tolist() == told["Unsampler sigmas"]


def test_two_requests_with_one_seed_are_one(client: Client) -> None:
    read = [(client.folder / client.run(seed="9")[-1]["images"][-1]).read_bytes() for _ in range(2)]
    assert read[0] == read[1]
    assert read[0] != (client.folder / client.run(seed="10")[-1]["images"][-1]).read_bytes()


def test_a_picture_comes_from_the_page_alone(client: Client) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 40, 10)).save(file, "PNG")
    data = {"data": base64.b64encode(file.getvalue()).decode()}
    *_, last = client.run({"output": ["frames"]}, data)
    with Image.open(client.folder / last["images"][0]) as clean:
        assert clean.size == (24, 12) and clean.convert("RGB").getpixel((5, 5)) == (200, 40, 10)


CASES: list[tuple[dict[str, Any], str, int]] = [
    ({"noise": "path"}, "euler", 3),
    ({"noise": "independent", "step_increment": 2}, "euler", 2),
    ({"mode": "invert"}, "euler", 1),
    ({"mode": "replay", "output": ["frames", "latents", "init"], "end_at_step": 0}, "euler_ancestral", 2),
]


@pytest.mark.parametrize(("values", "sampler", "step"), CASES, ids=str)
def test_a_file_is_gone_on_from(client: Client, values: dict[str, Any], sampler: str, step: int) -> None:
    """Cut at a level it is that level's z; shown again it is its levels; sampled on it is the same twice."""
    *_, last = client.run({"output": ["frames", "latents"], **values}, sampler=sampler)
    (name,) = last["result"]["extra_generation_params"]["Unsampler latents names"]
    saved = trajectory.load(client.folder / name)
    _, (answer,) = client.post("/ask", {"id": 7, "kind": "choose", "name": name, "step": step})
    assert answer["id"] == 7
    cut = trajectory.load(client.folder / answer["name"])
    assert torch.equal(cut.latent, saved.z[(saved.sigmas == saved.schedule[step]).nonzero().item()])
    asked = request({"output": ["frames", "init"], "trajectory": answer["name"]}, sampler=sampler)
    _, (foreseen,) = client.post("/ask", {"id": 8, "kind": "ask", "wants": ["schedule", "check"], **asked})
    assert foreseen["check"]["errors"] == []
    _, lines = client.post("/run", asked)
    told = lines[-1]["result"]["extra_generation_params"]
    assert told["Unsampler sigmas"] == cut.sigmas.tolist()
    assert [foreseen["schedule"]["sigmas"][i] for i in foreseen["schedule"]["kept"]] == cut.sigmas.tolist()


def test_a_replay_gives_the_picture_again(client: Client) -> None:
    asked = {"output": ["latents", "init"], "mode": "replay", "end_at_step": 0}
    *_, last = client.run(asked, sampler="euler_ancestral")
    (name,) = last["result"]["extra_generation_params"]["Unsampler latents names"]
    *_, again = client.run(
        {"output": ["frames", "init"], "mode": "replay", "trajectory": name}, sampler="euler_ancestral"
    )
    source, *_, picture = again["images"]
    with Image.open(client.folder / source) as one, Image.open(client.folder / picture) as other:
        assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


# How runs wait and end


class Slow:
    """A run that is read line by line."""

    def __init__(self, client: Client, **own: Any) -> None:
        asked = {"output": ["animation"], "mode": "invert", "steps": 1000, "tolerance": 1e-12}
        body = json.dumps(request(asked, size="128", **own)).encode()
        self.connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        said = {"Host": client.host, "Origin": f"http://{client.host}", "Content-Type": "application/json"}
        self.connection.request("POST", "/run", body, said)
        self.reply = self.connection.getresponse()

    def line(self) -> Any:
        return json.loads(self.reply.readline())

    def until(self, key: str) -> Any:
        while key not in (line := self.line()):
            pass
        return line

    def end(self) -> None:
        self.reply.close()
        self.connection.close()


def test_a_second_waits_and_is_told_and_each_can_be_interrupted(client: Client) -> None:
    before = sorted(client.folder.iterdir())
    first = Slow(client)
    assert "waiting" not in (begun := first.line())
    assert first.until("progress")["progress"]["part"] == "inverting"
    second, third = Slow(client), Slow(client)
    behind = sorted((run.until("waiting") for run in (second, third)), key=lambda line: line["waiting"])
    assert [line["waiting"] for line in behind] == [1, 2]
    waits = second.until("waiting")
    assert client.post("/interrupt", {"run": waits["run"]}) == (200, [{}])
    assert second.until("interrupted")
    assert first.until("progress")  # it goes on
    assert client.post("/interrupt", {"run": begun["run"]}) == (200, [{}])
    assert first.until("interrupted")
    assert third.until("progress")
    third.end()  # its page is closed
    *_, done = client.run()
    assert done["images"]
    for run in (first, second):
        run.end()
    assert len(set(client.folder.iterdir()) - set(before)) == 1, "only the finished run has left anything"
    assert not list(client.folder.rglob("*.part"))


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    """In the midst of a run, with another that waits."""
    command = [sys.executable, "-m", "lib_unsampler", "serve", "--port", "0", "--folder", str(tmp_path / "results")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    kept: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    kept["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    with subprocess.Popen(command, cwd=tmp_path, env=env, **kept) as process:
        said = process.stdout.readline()
        port = int(said.split("/")[2].split(":")[1])

        class Served:
            server_port = port
            work = work.Work(tmp_path / "results")

        client = Client(Served())  # type: ignore[arg-type]
        assert client.ask("GET", "/")[0] == 200
        Slow(client).until("progress")
        Slow(client).until("waiting")
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130 and time.monotonic() - begun < 10, errors
    assert errors.splitlines()[-1] == "unsampler: interrupted; no half-written file was left"
    assert "Traceback" not in errors
    assert not list((tmp_path / "results").iterdir())


def test_a_taken_port_is_said(client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lib_unsampler.standalone.cli import main

    for port, said in ((client.port, "cannot be had"), (70000, "is not a whole number from 0 to 65535")):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--port", str(port), "--folder", str(tmp_path)])
        assert ended.value.code == 2 and said in capsys.readouterr().err

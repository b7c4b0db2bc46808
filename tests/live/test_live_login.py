"""A running WebUI whose page has a login: ``WEBUI_URL`` is its address, ``WEBUI_LOGIN`` the ``user:password`` given to
``--gradio-auth``; ``WEBUI_API_AUTH`` that given to ``--api-auth``, if it was.

Not in a browser: what is asked without logging in is asked without a page. Run with ``-m live``.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest

URL, LOGIN, API = (os.environ.get(name, "") for name in ("WEBUI_URL", "WEBUI_LOGIN", "WEBUI_API_AUTH"))
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not (URL and LOGIN), reason="WEBUI_URL and WEBUI_LOGIN name no running WebUI with a login"),
]
SHELVES = ("/unsampler/v1/latents", "/unsampler/v1/animations")


class Client:
    """Who keeps cookies, and has a name and a password for the API."""

    def __init__(self, account: str = "") -> None:
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        basic = base64.b64encode(account.encode()).decode()
        self._headers = {"Authorization": f"Basic {basic}"} if account else {}

    def ask(self, path: str, data: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
        asked = urllib.request.Request(URL + path, data, {"Content-Type": kind, **self._headers})
        try:
            with self._opener.open(asked, timeout=300) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def log_in(self, account: str) -> int:
        user, password = account.split(":")
        form = urllib.parse.urlencode({"username": user, "password": password}).encode()
        return self.ask("/login", form, "application/x-www-form-urlencoded")[0]

    def statuses(self, paths: list[str]) -> list[int]:
        return [self.ask(path)[0] for path in paths]


@pytest.fixture(scope="module")
def paths() -> list[str]:
    """The routes, and the files that one request made."""
    picture = base64.b64encode((Path(__file__).parents[2] / "lib_unsampler/assets/cat.jpg").read_bytes()).decode()
    body = {"init_images": [picture], "width": 64, "height": 64, "steps": 4, "save_images": True}
    body["alwayson_scripts"] = {"Batch Unsampler": {"args": [{"output": ["latents", "animation"]}]}}
    status, reply = Client(API).ask("/sdapi/v1/img2img", json.dumps(body).encode())
    assert status == 200, reply[:500]
    told = json.loads(json.loads(reply)["info"])["extra_generation_params"]
    names = [told[f"Unsampler {kind} names"][0] for kind in ("latents", "animations")]
    return [*SHELVES, *(f"{shelf}/{name}" for shelf, name in zip(SHELVES, names))]


def test_nothing_without_a_login(paths: list[str]) -> None:
    stranger = Client()
    assert stranger.statuses([*paths, "/config"]) == [401] * 5
    assert stranger.log_in(LOGIN + "x") == 400
    assert stranger.statuses(paths) == [401] * 4
    assert Client("some:one").statuses(paths) == [401] * 4


def test_who_has_logged_in_gets_all_but_what_the_api_s_password_guards(paths: list[str]) -> None:
    user = Client()
    assert user.log_in(LOGIN) == 200
    assert user.statuses([*paths, "/config"]) == [401 if API else 200] * 4 + [200]
    if API:
        assert Client(API).statuses([*paths, "/config"]) == [200] * 4 + [401]


def test_the_form_s_questions_need_the_login() -> None:
    """As the page's script asks: an event of the page whose input is the hidden box."""
    user = Client()
    assert user.log_in(LOGIN) == 200
    config: dict[str, Any] = json.loads(user.ask("/config")[1])
    ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    asked = ids["batch_unsampler_question"]
    number, event = next((n, e) for n, e in enumerate(config["dependencies"]) if e["inputs"] == [asked])
    question = json.dumps({"id": 1, "values": {}, "files": True})
    body = {"fn_index": event.get("id", number), "data": [question], "session_hash": "x"}
    told = json.dumps(body).encode()
    assert [Client().ask(f"/{way}/predict", told)[0] for way in ("run", "api")] == [401, 401]
    assert Client().ask("/queue/join", told)[0] in (401, 404, 405)
    status, reply = user.ask("/run/predict", told)
    assert status == 200 and b"data-answer" in reply, reply[:500]

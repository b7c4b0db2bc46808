"""The README says what the code does: its table is the settings, its examples are accepted."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lib_unsampler.settings import Settings, allowed, parse_args, whole_help

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def options_table() -> str:
    rows = ["| field | default | allowed | where | what |", "|---|---|---|---|---|"]
    for f in fields(Settings):
        cells = (
            f"`{f.name}`",
            plain(f.default) or "(empty)",
            allowed(f),
            ", ".join(f.metadata["surfaces"]),
            whole_help(f),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def json_example() -> dict[str, Any]:
    return json.loads(re.search(r"```json\n(.*?)```", README, re.S).group(1))


def test_the_options_table_is_the_settings() -> None:
    shown = re.search(r"<!-- options.*?-->\n(.*?)\n?<!-- /options -->", README, re.S).group(1)
    assert shown.strip() == options_table()


def test_the_json_example_is_accepted() -> None:
    args = json_example()["alwayson_scripts"]["Batch Unsampler"]["args"]
    enabled, settings = parse_args(args, "host")
    assert enabled and settings.step_increment == 2


def test_the_positional_example_is_accepted() -> None:
    shown = re.search(r"positional form works too: `(\[.*?\])`", README).group(1)
    enabled, settings = parse_args(json.loads(shown), "host")
    assert enabled and (settings.output, settings.step_increment) == (("frames",), 2)


def test_every_file_the_readme_shows_is_there() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_every_command_of_the_readme_parses() -> None:
    from lib_unsampler.standalone.cli import make_parser

    lines = re.findall(r"^python -m lib_unsampler (.*)$", README, re.M)
    assert len(lines) >= 5
    for line in lines:
        make_parser().parse_args(shlex.split(line))


@pytest.mark.live
def test_the_json_example_runs_in_a_live_host() -> None:
    url = os.environ.get("WEBUI_URL")
    if not url:
        pytest.skip("WEBUI_URL names no running WebUI")
    picture = base64.b64encode((ROOT / "lib_unsampler/assets/cat.jpg").read_bytes()).decode()
    body = {**json_example(), "init_images": [picture], "width": 128, "height": 128}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/sdapi/v1/img2img", data, {"Content-Type": "application/json"})
    reply = json.load(urllib.request.urlopen(request))
    notes = json.loads(reply["info"])["extra_generation_params"]["Unsampler images"]
    assert [n["kind"] for n in notes] == ["animation"] + ["frame"] * 11
    assert len(reply["images"]) == 12
    assert base64.b64decode(reply["images"][0]).startswith(b"GIF89a")

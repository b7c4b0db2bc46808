"""The READMEs say what the code does: the table is the settings, examples run, links lead somewhere."""

from __future__ import annotations

import ast
import base64
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import lib_unsampler
from lib_unsampler.settings import Settings, allowed, parse_args, whole_help

ROOT = Path(__file__).resolve().parent.parent
README, CODE, WEBUI, BENCH = (
    (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for folder in ("", "lib_unsampler", "lib_unsampler/webui", "lib_unsampler/bench")
)
READMES = {"": README, "lib_unsampler": CODE, "lib_unsampler/webui": WEBUI, "lib_unsampler/bench": BENCH}
"""The text of each README by its folder."""

every_readme = pytest.mark.parametrize("folder", READMES, ids=lambda folder: folder or "root")
OPTIONS = re.compile(r"<!-- options.*?-->\n(.*?)\n?<!-- /options -->", re.S)
MOST_LINES, MOST_WORDS = 230, 2500


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


def python_examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def prose(text: str) -> str:
    """A README without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


def anchors(text: str) -> Iterator[str]:
    """The anchors that GitHub gives a README's headings."""
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        yield f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor
        seen[anchor] += 1


def test_the_readme_can_be_read_in_one_go() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    assert len(OPTIONS.sub("", README).split()) <= MOST_WORDS


def test_the_options_table_is_the_settings() -> None:
    assert OPTIONS.search(README).group(1).strip() == options_table()


def test_the_json_example_is_accepted() -> None:
    args = json_example()["alwayson_scripts"]["Batch Unsampler"]["args"]
    enabled, settings = parse_args(args, "host")
    assert enabled and settings.step_increment == 2


def test_the_positional_example_is_accepted() -> None:
    shown = re.search(r"positional form works too: `(\[.*?\])`", README).group(1)
    enabled, settings = parse_args(json.loads(shown), "host")
    assert enabled and (settings.output, settings.step_increment) == (("frames",), 2)


@pytest.mark.parametrize("example", python_examples(WEBUI), ids=["requests", "webuiapi"])
def test_the_args_of_the_api_examples_are_accepted(example: str) -> None:
    dicts = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Dict)]
    found = [
        ast.literal_eval(value) for node in dicts for key, value in zip(node.keys, node.values) if key.value == "args"
    ]
    assert len(found) == 1
    enabled, settings = parse_args(found[0], "host")
    assert enabled and settings != Settings()


@every_readme
def test_every_file_a_readme_shows_is_there(folder: str) -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", READMES[folder]):
        assert (ROOT / folder / path).is_file(), path


@every_readme
def test_every_relative_link_leads_somewhere(folder: str) -> None:
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]*)\)", prose(READMES[folder])):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / folder / path).resolve() if path else ROOT / folder / "README.md"
        assert target.exists() and target.is_relative_to(ROOT), link
        if heading:
            assert heading in set(anchors(target.read_text(encoding="utf-8"))), link


@every_readme
def test_every_path_a_readme_names_is_there(folder: str) -> None:
    for path in re.findall(r"`((?:scripts|tests|lib_unsampler)/[\w/.]+)`", READMES[folder]):
        assert (ROOT / path).exists(), path


def test_the_other_readmes_can_be_found_from_the_first() -> None:
    for folder in READMES:
        assert not folder or f"]({folder}/README.md" in README


def test_every_command_of_the_readmes_parses() -> None:
    from lib_unsampler.standalone.cli import SERVE, Parser, make_parser
    from lib_unsampler.standalone.serve.command import add_arguments

    page = Parser()
    add_arguments(page)

    lines = [line for text in READMES.values() for line in re.findall(r"^python -m lib_unsampler (.*)$", text, re.M)]
    spans = [line for text in READMES.values() for line in re.findall(r"`python -m lib_unsampler ([^`]*)`", text)]
    assert len(lines) >= 5
    for line in [*lines, *(span for span in spans if span != "--help")]:
        first, *rest = shlex.split(line)
        page.parse_args(rest) if first == SERVE else make_parser().parse_args([first, *rest])


def test_every_bench_is_described() -> None:
    named = set(re.findall(r"`python -m lib_unsampler\.bench (\w+)`", BENCH)) - {"NAME"}
    there = {m.name for m in pkgutil.iter_modules([str(ROOT / "lib_unsampler/bench")]) if not m.name.startswith("_")}
    assert named == there


def test_the_variables_of_the_live_tests_are_told() -> None:
    read = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"\"(WEBUI_\w+|CHROMIUM|[A-Z0-9]+_DIR)\"", file.read_text(encoding="utf-8"))
    }
    assert read == set(re.findall(r"`(WEBUI_\w+|CHROMIUM|[A-Z0-9]+_DIR)`", CODE))


def test_the_core_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies it has the source back: near it by inversion, to the last bit by replay."""
    (example,) = python_examples(CODE)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(compile(example, "lib_unsampler/README.md", "exec"), made)
    source, saved, walked = made["source"], made["saved"], made["walked"]
    assert made["z"].shape == (20, *source.shape) and torch.equal(saved.z, made["z"])
    assert torch.equal(saved.latent, made["z"][-1]) and torch.isfinite(made["resampled"]).all()
    assert [level.index for level in walked] == list(made["plan"].visited)
    assert (made["inverted"] - source).abs().max() < 1e-4 * source.std()
    assert torch.equal(made["replayed"], source)


def test_the_core_example_uses_what_the_readme_offers() -> None:
    (example,) = python_examples(CODE)
    (line,) = re.findall(r"^from lib_unsampler import (.*)$", example, re.M)
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", CODE[CODE.index("## For people who script the core") :], re.M)
    offered = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(line.split(", ")) <= offered == set(lib_unsampler.HOMES)
    for name in offered:
        assert getattr(lib_unsampler, name).__module__.startswith("lib_unsampler.core.")


def test_importing_the_package_loads_nothing_large() -> None:
    program = (
        "import sys, lib_unsampler\n"
        "print(lib_unsampler.__version__, *{'torch', 'numpy', 'PIL', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


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

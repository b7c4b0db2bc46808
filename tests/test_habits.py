"""How the code is written, typed and layered: pyproject.toml says it, ruff, mypy and import-linter see to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import install

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {
    "ruff check": ["-m", "ruff", "check"],
    "ruff format": ["-m", "ruff", "format", "--check"],
    "mypy": ["-m", "mypy"],
    "lint-imports": ["-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
}


def run(check: str, folder: Path = ROOT) -> tuple[int, str]:
    """A check's exit status and all that it says."""
    command = [sys.executable, *CHECKS[check]]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1"},  # import-linter's banner is no ASCII
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_the_check_finds_nothing(check: str) -> None:
    status, said = run(check)
    assert status == 0, said


NODE = ROOT / "tests/node"
"""The pinned tools from npm; they are installed beside this Python, never into the repository."""


def test_the_page_s_script_is_clean(node_tools: Path) -> None:
    shutil.copy(NODE / "eslint.config.mjs", node_tools)  # its imports are found beside it
    eslint = node_tools / "node_modules/eslint/bin/eslint.js"
    command = ["node", str(eslint), "--config", str(node_tools / "eslint.config.mjs"), "--max-warnings", "0"]
    done = subprocess.run(
        [*command, "javascript", "lib_unsampler/standalone/serve"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("wrong", ["setInterval(() => 0, 100);", "left = 1;", "var old = 1;", "window.ours = 1;"])
def test_what_the_script_may_not_do_is_found(wrong: str, node_tools: Path, tmp_path: Path) -> None:
    shutil.copy(NODE / "eslint.config.mjs", node_tools)
    (tmp_path / "wrong.js").write_text(f'(() => {{\n    "use strict";\n    {wrong}\n}})();\n', encoding="utf-8")
    eslint = node_tools / "node_modules/eslint/bin/eslint.js"
    command = ["node", str(eslint), "--config", str(node_tools / "eslint.config.mjs"), "wrong.js"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr


LAYERS = "Each wing imports only those below it, and none beside it"
BENCH = "The benches run without a host"
CORE = "core knows torch, numpy, safetensors and Python's own"
HOST = "Only the host's files know the WebUI"
SAMPLING = "k-diffusion is the host's; the command line loads its samplers alone"
PAGE = "Only the page knows gradio"
WRONG = [
    (LAYERS, "files.py", "from . import settings"),
    (LAYERS, "core/noising.py", "from ..settings import Settings"),
    (LAYERS, "core/noising.py", "from ..pictures import render"),
    (LAYERS, "pictures/reel.py", "from ..webui import routes"),
    (LAYERS, "pictures/reel.py", "from ..standalone import sampling"),
    (LAYERS, "pictures/reel.py", "from ..page import shelf"),
    (LAYERS, "page/shelf.py", "from ..standalone import sampling"),
    (LAYERS, "webui/routes.py", "from ..standalone import sampling"),
    (LAYERS, "standalone/sampling.py", "from ..webui import routes"),
    (BENCH, "bench/scale.py", "from ..webui import routes"),
    (CORE, "core/noising.py", "import triton"),
    (CORE, "core/noising.py", "import einops"),
    (CORE, "core/kernels.py", "from PIL import Image"),
    (HOST, "core/fused.py", "from modules import shared"),
    (HOST, "pictures/reel.py", "from modules import shared"),
    (HOST, "webui/routes.py", "from modules import shared"),
    (HOST, "standalone/sampling.py", "from modules import shared"),
    (SAMPLING, "webui/axes.py", "import k_diffusion"),
    (SAMPLING, "standalone/sampling.py", "import k_diffusion"),
    (PAGE, "webui/routes.py", "import gradio"),
    (PAGE, "webui/host/page.py", "import gradio"),
]
"""Arrows that no file may have, with the contract that each breaks."""


@pytest.mark.parametrize(("contract", "file", "arrow"), WRONG)
@pytest.mark.one_of(3)
def test_one_wrong_import_breaks_its_contract(contract: str, file: str, arrow: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "lib_unsampler", tmp_path / "lib_unsampler", ignore=shutil.ignore_patterns("assets"))
    changed = tmp_path / "lib_unsampler" / file
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n\ndef late() -> None:\n    {arrow}\n", encoding="utf-8")
    status, said = run("lint-imports", tmp_path)
    assert status == 1 and f"{contract} BROKEN" in said, said


def test_the_workflow_runs_the_two_commands_under_every_python() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    (_, oldest), (_, newest) = install.OLDEST, install.NEWEST
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(oldest, newest + 1)]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["python install.py demo", "python install.py test"]

"""What the tests share: one torch thread, a small picture, draws whose noise is known."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib_unsampler.standalone import kdiffusion  # noqa: E402 - the path comes first

kdiffusion.sampling()  # for every test: k-diffusion without the packages of its training code, which are not here
torch.set_num_threads(1)  # small tensors; threads only wait for one another on a busy machine

Draw = Callable[[int], Tensor]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Of the cases of a test under ``one_of(n)`` every n-th is in the default suite; the others are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        for mark in item.iter_markers("one_of"):
            test = item.nodeid.split("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker("slow")
            seen[test] += 1


@pytest.fixture(scope="session")
def node_tools() -> Path:
    """The folder of the pinned npm packages of tests/node: made once beside this Python, outside the repository."""
    npm = shutil.which("npm")
    if not npm or not shutil.which("node"):
        pytest.skip("no node and npm here, which lint the page's script and hold the accessibility rules")
    lock = (ROOT / "tests/node/package-lock.json").read_bytes()
    folder = Path(sys.prefix) / f"node-tools-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not (folder / "installed").exists():
        folder.mkdir(exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(ROOT / "tests/node" / name, folder)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=300)
        if done.returncode:
            pytest.skip(f"npm cannot get the pinned tools: {done.stderr.strip().splitlines()[-1:]}")
        (folder / "installed").touch()
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A 32 x 24 photograph-like PNG, cut from the bundled cat."""
    path = tmp_path / "picture.png"
    Image.open(ROOT / "lib_unsampler/assets/cat.jpg").convert("RGB").resize((32, 24)).save(path)
    return path


@pytest.fixture
def latent() -> Callable[..., Tensor]:
    """Makes a clean latent that is not noise: smooth, not centred, different for each image."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        ramp = torch.linspace(-1.5, 2.5, int(torch.tensor(shape).prod()), dtype=torch.float64)
        return (ramp + 0.7 * torch.sin(9 * ramp)).reshape(shape).to(dtype)

    return make


@pytest.fixture
def known_draws() -> Callable[..., tuple[Draw, Tensor]]:
    """Makes (draw, all of its draws) for a shape, so that a test can write the formula with them."""

    def make(count: int, *shape: int, seed: int = 0) -> tuple[Draw, Tensor]:
        noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))
        return (lambda j: noise[j]), noise

    return make

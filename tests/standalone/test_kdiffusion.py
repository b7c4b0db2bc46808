"""k-diffusion's samplers without the rest of it: what is loaded, what is not, and that nothing else is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = [
    *("torchvision", "kornia", "wandb", "clip", "skimage", "accelerate", "einops", "cleanfid", "jsonmerge", "dctorch"),
    *("scipy", "torchsde", "torchdiffeq", "torch._dynamo", "torch._inductor", "torch.onnx", "matplotlib", "pandas"),
]
"""What k-diffusion's own ``__init__`` loads, and what only some samplers call."""


def python(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_smallest_run_loads_only_what_it_uses(picture: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom lib_unsampler.standalone.cli import main\n"
        "out, *heavy = sys.argv[2:]\nmain([sys.argv[1], '-o', out, '--steps', '1'])\n"
        "print('loaded', *(name for name in heavy if name in sys.modules))"
    )
    names = [*HEAVY, "torch", "k_diffusion.sampling"]
    *_, loaded = python(program, picture, tmp_path / "a.gif", *names).splitlines()
    assert loaded.split() == ["loaded", "torch", "k_diffusion.sampling"]


LOAD = """
import sys
from lib_unsampler.standalone import kdiffusion
import torch
before = set(sys.modules)
kd = kdiffusion.sampling()
def model(x, sigma, **_):
    return x * 0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2)
sigmas = kd.get_sigmas_karras(4, 0.1, 10.0)
x = 10 * torch.randn(1, 1, 4, 4)
"""


def test_what_a_sampler_calls_comes_when_it_is_called() -> None:
    program = LOAD + (
        "sampler, module = sys.argv[1:]\nassert module not in sys.modules\n"
        "made = getattr(kd, f'sample_{sampler}')(model, x, sigmas, disable=True)\n"
        "assert made.isfinite().all() and sys.modules[module].__file__"
    )
    python(program, "lms", "scipy")
    python(program, "dpmpp_sde", "torchsde")


def test_what_is_missing_is_missed_by_name_and_only_when_it_is_called() -> None:
    program = LOAD + (
        "sys.modules['scipy'] = None\nkd.sample_euler(model, x, sigmas, disable=True)\n"
        "try: kd.sample_lms(model, x, sigmas, disable=True)\nexcept ImportError as error: print(error)"
    )
    assert "scipy" in python(program)


def test_no_stand_in_is_left_behind() -> None:
    """Whoever imports torchsde or torchvision afterwards gets the real one, or is told that there is none."""
    program = LOAD + "print(*sorted(n for n in set(sys.modules) - before if type(sys.modules[n]).__name__ == 'Later'))"
    assert python(program).split() == []
    program = LOAD + "from k_diffusion import sampling, external\nassert sampling is kd and external.CompVisDenoiser"
    python(program)


def test_k_diffusion_that_is_there_already_is_used_as_it_is() -> None:
    """As a script's own, imported whole."""
    program = (
        "import sys, types\nwhole = types.ModuleType('k_diffusion')\nwhole.__path__ = []\n"
        "own = types.ModuleType('k_diffusion.sampling')\n"
        "sys.modules.update({'k_diffusion': whole, 'k_diffusion.sampling': own})\n"
        "from lib_unsampler.standalone import kdiffusion\nassert kdiffusion.sampling() is own"
    )
    python(program)


def test_without_k_diffusion_the_command_line_says_what_to_do(picture: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom importlib.abc import MetaPathFinder\n"
        "class Nothing(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'k_diffusion': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from lib_unsampler.standalone.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert end.code == 2"
    )
    command = [sys.executable, "-c", program, str(picture), "-o", str(tmp_path / "a.gif")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "No module named 'k_diffusion'" in done.stderr
    assert "python install.py demo" in done.stderr.splitlines()[-1]

"""The noise behind z: what img2img samples with after z was drawn made no part of it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import latents_of, pixels
from torch import Tensor


@pytest.fixture
def drawn(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Tensor]]:
    """Every draw of any generator, with whose it was."""
    from modules import rng

    seen: list[tuple[Any, Tensor]] = []
    own = rng.ImageRNG.next

    def noted(self: Any) -> Tensor:
        made = own(self)
        seen.append((self, made))
        return made

    monkeypatch.setattr(rng.ImageRNG, "next", noted)
    return seen


def correlations(saved: Any, added: list[Tensor]) -> Tensor:
    """Between the noises that made the levels, least noisy first, and those that sampling added."""
    flow = saved.z.double() - saved.source
    scales = saved.sigmas.double().reshape(-1, 1, 1, 1, 1)
    if saved.settings["noise"] == "path":
        flow = torch.cat([flow[:1], flow.diff(dim=0)])
        scales = torch.cat([scales[:1] ** 2, (scales**2).diff(dim=0)]).sqrt()
    one, other = (
        (t / t.norm(dim=1, keepdim=True)) for t in ((flow / scales).flatten(1), torch.stack(added).flatten(1))
    )
    return one @ other.double().T


@pytest.mark.parametrize("noise", ["independent", "path", "shared"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_sampling_on_uses_no_noise_that_made_z(
    noise: str, strength: float, host: SimpleNamespace, drawn: list[tuple[Any, Tensor]]
) -> None:
    settings = {"output": ["init", "latents"], "noise": noise}
    p, processed = host.run(settings, sampler_name="Euler a", denoising_strength=strength)
    (saved,) = latents_of(processed)
    mine = [made for whose, made in drawn if whose is p.rng]
    added = mine[-(len(saved.z) - 1) :]
    assert len(added) == len(saved.z) - 1 >= 3
    size = saved.source.numel()
    assert correlations(saved, added).abs().max() < 6 / size**0.5
    if noise == "shared":
        assert len(mine) == len(saved.z)  # img2img's own draws, in its own order
        return
    *_, name = processed.extra_generation_params["Unsampler latents names"]
    again = host.run({"output": ["init"], "trajectory": name}, sampler_name="Euler a", denoising_strength=strength)[1]
    first = host.run({**settings, "output": ["init"]}, sampler_name="Euler a", denoising_strength=strength)[1]
    assert pixels(again) == pixels(first) and Path(name).suffix == ".safetensors"


def loaded(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of a real host, in the double's place."""
    spec = importlib.util.spec_from_file_location(f"modules.{name}", folder / f"modules/{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"modules.{name}", module)
    monkeypatch.setattr(sys.modules["modules"], name, module, raising=False)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", ["NV", "CPU", "GPU"])
@pytest.mark.parametrize("checkout", ["A1111_DIR", "FORGE_DIR", "REFORGE_DIR", "CLASSIC_DIR", "NEO_DIR"])
def test_later_draws_are_the_host_s_own(
    checkout: str, source: str, host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own code for each source, one after the other, with nobody's generator touched."""
    folder = os.environ.get(checkout)
    if not folder:
        pytest.skip(f"{checkout} names no checkout of the WebUI")
    from modules import devices

    from lib_unsampler.webui.host import draws

    monkeypatch.setattr(devices, "cpu", torch.device("cpu"), raising=False)
    monkeypatch.setattr(host.shared, "device", torch.device("cpu"), raising=False)
    loaded(Path(folder), "rng_philox", monkeypatch)
    rng = loaded(Path(folder), "rng", monkeypatch)
    monkeypatch.setattr(draws, "rng", rng)
    for name, value in {"randn_source": source, "eta_noise_seed_delta": 7, "forge_try_reproduce": "None"}.items():
        monkeypatch.setattr(host.shared.opts, name, value, raising=False)
    p = SimpleNamespace(
        seeds=[5, 6], subseeds=[7, 8], subseed_strength=0.3, seed_resize_from_h=0, seed_resize_from_w=0
    )  # fmt: skip
    own = rng.ImageRNG((4, 8, 8), **vars(p))
    ours = draws.HostDraws(p, own.next())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = [ours.made(j) for j in (1, 2, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    wanted = [own.next() for _ in range(4)]
    assert all(torch.equal(a, wanted[j - 1]) and a.dtype == torch.float32 for a, j in zip(found, (1, 2, 4)))

"""What clients of an earlier version rely on: the order of the API's arguments, latents files, pasted parameters.

Nothing here follows the code: a change that breaks one of these breaks somebody's script or picture.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lib_unsampler.core.replay import replay
from lib_unsampler.core.trajectory import VERSION, Trajectory, TrajectoryError, load
from lib_unsampler.settings import Settings, parse_args, pasted, surface_fields
from lib_unsampler.standalone.embedded import make_model
from lib_unsampler.standalone.sampling import kd

SAMPLES = Path(__file__).resolve().parent / "samples"

POSITIONAL_0_1_0 = (
    *("output", "steps", "end_at_step", "step_increment", "noise", "normalize", "include_clean", "view", "reverse"),
    *("duration", "timing", "hold_first", "hold_last", "ping_pong", "loop", "captions", "format", "mode", "skip"),
    *("cfg", "positive", "negative", "solver", "tolerance", "max_calls", "panel", "report", "trajectory"),
)

PASTED_0_1_0 = {
    "Unsampler version": "0.1.0",
    "Unsampler output": "frames, animation, latents",
    "Unsampler steps": "30",
    "Unsampler end at step": "4",
    "Unsampler step increment": "2",
    "Unsampler noise": "path",
    "Unsampler normalize": "True",
    "Unsampler include clean": "False",
    "Unsampler view": "raw",
    "Unsampler reverse": "True",
    "Unsampler duration": "0.25",
    "Unsampler timing": "log sigma",
    "Unsampler hold first": "0.5",
    "Unsampler hold last": "1.5",
    "Unsampler ping pong": "True",
    "Unsampler loop": "3",
    "Unsampler captions": "True",
    "Unsampler format": "webp",
    "Unsampler cfg": "2.5",
    "Unsampler positive": 'a "quoted", text: x',
    "Unsampler negative": '[" "]',
}


def test_the_positional_arguments_keep_their_places() -> None:
    names = [f.name for f in surface_fields("host")]
    assert tuple(names[: len(POSITIONAL_0_1_0)]) == POSITIONAL_0_1_0


def test_a_positional_request_of_0_1_0_means_what_it_meant() -> None:
    args = [True, ["frames"], 30, 4, 2, "path", True, False, "raw", True, 0.25, "log sigma", 0.5, 1.5, True, 3, True]
    args += ["webp", "noise", 0, 2.5, "a dog", "rain", "reverse", 1e-4, 20, False, False, ""]
    enabled, settings = parse_args(args, "host")
    assert enabled
    assert (settings.output, settings.steps, settings.end_at_step) == (("frames",), 30, 4)
    assert (settings.format, settings.cfg, settings.positive, settings.negative) == ("webp", 2.5, "a dog", "rain")
    assert (settings.solver, settings.tolerance, settings.max_calls) == ("reverse", 1e-4, 20)


def test_parameters_of_0_1_0_paste_into_every_field() -> None:
    values = pasted(PASTED_0_1_0, "host")
    expected = Settings(
        output=("frames", "animation", "latents"),
        steps=30,
        end_at_step=4,
        step_increment=2,
        noise="path",
        normalize=True,
        include_clean=False,
        view="raw",
        reverse=True,
        duration=0.25,
        timing="log sigma",
        hold_first=0.5,
        hold_last=1.5,
        ping_pong=True,
        loop=3,
        captions=True,
        format="webp",
        cfg=2.5,
        positive='a "quoted", text: x',
        negative=" ",
    )
    assert values == {f.name: getattr(expected, f.name) for f in surface_fields("host")}


def noise_of(saved: Trajectory) -> torch.Tensor:
    """The noise at each level, for the mask's inside: z = x + s n."""
    return (saved.z - saved.source) / saved.sigmas.reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("name", ["shared-0.1.0", "webui-0.1.0", "shared-format-2"])
def test_a_latents_file_of_every_format_loads(name: str) -> None:
    """Made with seed 7 and shared noise: every level holds the seed's first draw, to float32's rounding of z."""
    saved = load(SAMPLES / f"{name}.safetensors")
    shape = tuple(saved.source.shape[1:])
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    assert saved.seeds == (7,) and len(saved.z) == 4 and saved.prediction == "eps"
    for noise, sigma in zip(noise_of(saved), saved.sigmas):
        assert (noise[0] - draw).abs().max() < 4e-7 * (1 + saved.source.abs().max() / sigma)
    assert torch.equal(saved.latent, saved.z[-1]) and torch.equal(saved.remaining, saved.schedule)


def test_there_is_a_sample_of_every_format() -> None:
    """Who raises the version stores samples of the one before."""
    found: dict[int, set[str]] = {}
    for path in SAMPLES.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.setdefault(int(file.metadata()["version"]), set()).add(path.name.split("-")[0])
    assert set(found) == set(range(1, VERSION + 1))
    assert all({"shared", "masked", "replay"} <= kinds for kinds in found.values())


@pytest.mark.parametrize("name", ["shared-format-2", "masked-format-2", "replay-format-2"])
def test_a_newer_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data = (SAMPLES / f"{name}.safetensors").read_bytes()
    (tmp_path / "new.safetensors").write_bytes(data.replace(b'"version": "2"', b'"version": "9"'))
    with pytest.raises(TrajectoryError, match="written in format 9 by a newer Batch Unsampler; this one reads up to"):
        load(tmp_path / "new.safetensors")


def test_a_masked_file_of_format_2_keeps_unmasked_levels() -> None:
    saved, plain = (load(SAMPLES / f"{name}-format-2.safetensors") for name in ("masked", "shared"))
    assert not saved.blended and torch.equal(saved.z, plain.z) and torch.equal(saved.latent, plain.latent)
    assert 0 == saved.mask.min() < saved.mask.max() == 1


def test_a_masked_latents_file_of_0_1_0_goes_on_from_the_unmasked_state() -> None:
    saved = load(SAMPLES / "masked-0.1.0.safetensors")
    plain = load(SAMPLES / "shared-0.1.0.safetensors")
    assert torch.equal(saved.latent, plain.latent)
    assert torch.equal(saved.source, plain.source)


def test_a_masked_file_of_0_1_0_shows_the_source_outside_its_mask() -> None:
    saved = load(SAMPLES / "masked-0.1.0.safetensors")
    outside = (saved.mask == 0).expand_as(saved.source)
    assert saved.blended and outside.any()
    assert all(torch.equal(z[outside], saved.source[outside]) for z in saved.z)


@pytest.mark.parametrize("name", ["replay-0.1.0", "replay-format-2"])
def test_a_replay_of_every_format_gives_the_source_back(name: str) -> None:
    saved = load(SAMPLES / f"{name}.safetensors")
    model = make_model("gaussian", "", *saved.source.shape[-2:])
    back = replay(kd.sample_euler_ancestral, model, saved.replay.sigmas, saved.replay, 0, disable=True)
    assert (back - saved.source).abs().max() < 1e-5

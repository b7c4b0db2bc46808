"""The command line, end to end: what the files hold, what goes on from them, and one line for anything wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib_unsampler.core import trajectory
from lib_unsampler.pictures import render
from lib_unsampler.settings import SAMPLERS, allowed, surface_fields
from lib_unsampler.standalone import running
from lib_unsampler.standalone.cli import main, make_parser
from lib_unsampler.standalone.embedded import GaussianPrior, make_model
from lib_unsampler.standalone.reading import load_mask, load_picture
from lib_unsampler.standalone.sampling import STOCHASTIC, get_sigmas

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "4")
Capture = pytest.CaptureFixture[str]


def run(*arguments: object) -> None:
    """A run that must succeed."""
    assert main([str(a) for a in arguments]) == 0


def refused(capsys: Capture, *arguments: object) -> str:
    """A run that must end with status 2 and exactly one line on standard error."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("unsampler: error: ") and err.endswith("\n") and err.count("\n") == 1 and "\r" not in err
    return err.removeprefix("unsampler: error: ").rstrip("\n")


def pixels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))


def gif_frames(path: Path) -> tuple[list[np.ndarray], list[int], str]:
    frames, times = [], []
    with Image.open(path) as gif:
        comment = gif.info["comment"].decode()
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB"), float))
            times.append(gif.info["duration"])
    return frames, times, comment


@pytest.fixture
def half_mask(tmp_path: Path) -> Path:
    """A hard mask of the picture's size: the right half is unsampled."""
    path = tmp_path / "mask.png"
    mask = Image.new("L", (32, 24), 0)
    mask.paste(255, (16, 0, 32, 24))
    mask.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, picture: Path) -> Path:
    """A folder of two pictures and a text."""
    path = tmp_path / "pictures"
    path.mkdir()
    for name in ("b.png", "a.JPG"):
        Image.open(picture).save(path / name)
    (path / "notes.txt").write_text("no picture")
    return path


# What comes out


def test_a_shorter_run_leaves_no_frames_of_a_longer_one(picture: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    run(picture, "--frames", frames, "--steps", "9")
    (frames / "mine.png").write_bytes(picture.read_bytes())
    run(picture, "--frames", frames, "--steps", "3", "--positive", "sea")
    assert len(list(frames.glob("0*.png"))) == 4
    assert (frames / "mine.png").exists()


@pytest.mark.parametrize("options", [(), ("--reverse",), ("--no-include-clean", "--step-increment", "2")], ids=str)
def test_the_gif_is_the_frames_in_order(options: tuple[str, ...], picture: Path, tmp_path: Path) -> None:
    gif, frames = tmp_path / "out.gif", tmp_path / "frames"
    run(picture, "-o", gif, "--frames", frames, "--duration", "0.25", "--view", "raw", *SHORT, *options)
    stills = [pixels(p).double().numpy() for p in sorted(frames.iterdir())]
    stills = stills[::-1] if "--reverse" in options else stills
    moving, times, comment = gif_frames(gif)
    assert len(moving) == len(stills) == (2 if "--no-include-clean" in options else 5)
    assert times == [250] * len(moving)
    distance = np.array([[np.abs(m - s).mean() for s in stills] for m in moving])
    assert (distance.argmin(1) == np.arange(len(moving))).all()
    assert comment.startswith("Batch Unsampler") and "steps: 4" in comment and "duration: 0.25" in comment


def test_frames_are_the_view_of_each_level_named_by_sigma(picture: Path, tmp_path: Path) -> None:
    """z = x + s n with the seed's own draw, divided by sqrt(1 + s^2): written here from the definition."""
    run(picture, "--frames", tmp_path / "f", "--seed", "12", *SHORT)
    x = load_picture(picture, 512)
    n = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(12))
    sigmas = get_sigmas("karras", 4, "eps").flip(0)
    files = sorted((tmp_path / "f").iterdir())
    assert [p.name for p in files] == [f"{i:05d}_sigma_{s:.4f}.png" for i, s in enumerate(sigmas)]
    for path, s in zip(files, sigmas.double()):
        z = (x.double() + s * n.double()) / (1 + s**2).sqrt()
        truth = ((z.clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0)
        assert (pixels(path) - truth).abs().max() < 0.51
        with Image.open(path) as frame:
            assert "steps: 4" in frame.info["parameters"] and "seed: 12" in frame.info["parameters"]
    assert torch.equal(pixels(files[0]), pixels(picture))


@pytest.mark.parametrize("options", [(), ("--end-at-step", "2"), ("--end-at-step", "99"), ("--step-increment", "3")])
def test_latents_hold_the_levels_and_never_the_clean_one(
    options: tuple[str, ...], picture: Path, tmp_path: Path
) -> None:
    run(picture, "--latents", tmp_path / "t.safetensors", "--steps", 8, *options)
    saved, schedule = trajectory.load(tmp_path / "t.safetensors"), get_sigmas("karras", 8, "eps")
    end, increment = {(): (0, 1), "2": (2, 1), "99": (7, 1), "3": (0, 3)}[options and options[1]]
    kept = list(range(end, 8, increment))[::-1]
    assert saved.start == end and saved.sigmas.tolist() == schedule[kept].tolist()
    x = load_picture(picture, 512)
    n = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
    assert torch.equal(saved.source, x)
    assert torch.equal(saved.z, torch.stack([x + n * s for s in saved.sigmas]))
    assert saved.settings["steps"] == 8 and saved.seeds == (0,) and saved.info["model"] == "gaussian"


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_outside_the_mask_everything_is_the_source(soft: bool, picture: Path, half_mask: Path, tmp_path: Path) -> None:
    if soft:
        ramp = np.clip(np.linspace(-100, 355, 32), 0, 255).astype(np.uint8)
        Image.fromarray(np.tile(ramp, (24, 1))).save(half_mask)
    run(picture, "--mask", half_mask, "--frames", tmp_path / "f", "--latents", tmp_path / "t.safetensors", *SHORT)
    run(picture, "--frames", tmp_path / "whole", *SHORT)
    saved, m = trajectory.load(tmp_path / "t.safetensors"), load_mask(half_mask, 24, 32)
    n = torch.randn(saved.source.shape[1:], generator=torch.Generator().manual_seed(0))
    whole = torch.stack([saved.source + n * s for s in saved.sigmas])
    torch.testing.assert_close(saved.z, whole)
    assert torch.equal(saved.mask, m)
    out, inside = (m[0, 0] == 0), (m[0, 0] == 1)
    assert out.any() and inside.any()
    assert torch.equal(saved.latent, whole[-1])  # a model must not see a clean border
    for one, other in zip(sorted((tmp_path / "f").iterdir()), sorted((tmp_path / "whole").iterdir())):
        assert torch.equal(pixels(one)[out], pixels(picture)[out])
        assert torch.equal(pixels(one)[inside], pixels(other)[inside])


def test_sheet_and_curve_are_written(picture: Path, tmp_path: Path) -> None:
    run(picture, "--sheet", tmp_path / "s.png", "--curve", tmp_path / "deep" / "c.PNG", *SHORT)
    assert pixels(tmp_path / "s.png").unique(dim=0).shape[0] > 24 and pixels(tmp_path / "deep" / "c.PNG").ndim == 3


def test_a_limit_is_kept_and_said(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    film, sweep, saved = tmp_path / "a.webp", tmp_path / "s.webp", tmp_path / "t.safetensors"
    run(picture, "-o", film, "--sweep", sweep, "--steps", 6, "--max-megabytes", 0.004, "--latents", saved)
    said = [line for line in capsys.readouterr().err.splitlines() if "--max-megabytes: " in line]
    for file, line in zip((film, sweep), said, strict=True):
        assert file.stat().st_size <= 4000 and f"{file.stat().st_size / 1e6:.3g} MB at 32 x 24, quality" in line
    run("--resume", saved, "-o", film, "--max-megabytes", 0.004, "--animation-side", 16)
    assert Image.open(film).size == (16, 12) and film.stat().st_size <= 4000


def test_what_cannot_be_small_enough_is_said_when_all_else_is_made(
    picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    film, others = tmp_path / "a.gif", (tmp_path / "s.png", tmp_path / "t.safetensors")
    with pytest.raises(SystemExit) as caught:
        main(
            [
                str(a)
                for a in (picture, "-o", film, "--sheet", others[0], "--latents", others[1], "--max-megabytes", 1e-4)
            ]
        )
    assert caught.value.code == 2 and not film.exists() and all(other.exists() for other in others)
    assert "--max-megabytes: not made, since 0.0001 MB cannot be kept: at 32 x 24" in capsys.readouterr().err


def test_without_an_animation_nothing_but_the_named_is_written(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    run(picture, "--sheet", tmp_path / "s.png", *SHORT)
    assert {p.name for p in tmp_path.iterdir()} == {"picture.png", "s.png"}
    assert capsys.readouterr().out == f"{tmp_path / 's.png'}\n"


# Going on


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        ("--noise", "independent", "--sampler", "dpmpp_2m"),
        ("--noise", "path", "--normalize", "--sampler", "dpmpp_2m_sde", "--end-at-step", "3", "--seed", "9"),
        ("--model", "gaussian-flow", "--sampler", "heun", "--positive", "sea", "--cfg", "2", "--step-increment", "3"),
        ("--model", "mixture", "--sampler", "euler_ancestral", "--scheduler", "vp"),
    ],
    ids=lambda o: "_".join(o)[2:30],
)
def test_resuming_is_going_on_bit_for_bit(
    options: tuple[str, ...], masked: bool, picture: Path, half_mask: Path, tmp_path: Path
) -> None:
    mask = ("--mask", half_mask) if masked else ()
    there, saved, back = tmp_path / "there.png", tmp_path / "t.safetensors", tmp_path / "back.png"
    run(picture, "--resample", there, "--frames", tmp_path / "one", "--steps", 6, *mask, *options)
    run(picture, "--latents", saved, "--steps", 6, *mask, *options)
    run("--resume", saved, "--resample", back, "--frames", tmp_path / "two")
    assert there.read_bytes() == back.read_bytes()
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


@pytest.mark.parametrize("model", ["gaussian", "gaussian-flow"])
def test_resampling_follows_the_closed_form_ode(model: str, picture: Path, tmp_path: Path) -> None:
    """Exactly down to the last sigma, then the sampler's last step, D; to less than one pixel value."""
    there, back = tmp_path / "t.safetensors", tmp_path / "r.png"
    run(picture, "--latents", there, "--steps", 150, "--end-at-step", 60, "--model", model)
    run("--resume", there, "--resample", back, "--sampler", "heun", "--positive", "sea")
    saved, prior = trajectory.load(there), make_model(model, "sea", 24, 32)
    assert isinstance(prior, GaussianPrior)
    low = saved.schedule[-2]
    exact = prior(prior.solve(saved.latent, saved.sigmas[-1], low), low.reshape(1))
    truth = ((exact.clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0)
    assert (pixels(back) - truth).abs().max() < 1


def test_a_prompt_changes_what_comes_back(picture: Path, tmp_path: Path) -> None:
    run(picture, "--latents", tmp_path / "t.safetensors", *SHORT)
    means, strong = {}, ("sea", "--negative", "night", "--cfg", "3")
    for name, options in {"sea": ("sea",), "night": ("night",), "strong": strong}.items():
        run("--resume", tmp_path / "t.safetensors", "--resample", tmp_path / f"{name}.png", "--positive", *options)
        means[name] = pixels(tmp_path / f"{name}.png").double().mean()
    assert means["night"] < means["sea"] < means["strong"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_resamples_outside_the_mask_exactly(
    sampler: str, picture: Path, half_mask: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back.png"
    run(picture, "--resample", back, "--sampler", sampler, "--mask", half_mask, *SHORT)
    assert torch.equal(pixels(back)[:, :16], pixels(picture)[:, :16])
    assert not torch.equal(pixels(back)[:, 16:], pixels(picture)[:, 16:])


# Invert

INVERT = ("--mode", "invert", "--positive", "sunset", "--negative", "night", "--cfg", "3")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m"])
@pytest.mark.parametrize("model", ["gaussian", "gaussian-flow", "mixture"])
def test_an_exact_inversion_samples_back_to_the_picture_now_or_later(
    model: str, sampler: str, picture: Path, tmp_path: Path
) -> None:
    """Pixel for pixel under the same prompts; the latents file holds the model's states and resumes."""
    there, back, again = tmp_path / "t.safetensors", tmp_path / "back.png", tmp_path / "again.png"
    start = (picture, *INVERT, "--model", model, "--sampler", sampler, "--steps", 10, "--step-increment", 3)
    run(*start, "--resample", back, "--latents", there)
    assert torch.equal(pixels(back), pixels(picture))
    run("--resume", there, "--resample", again)
    assert torch.equal(pixels(again), pixels(picture))
    saved = trajectory.load(there)
    assert saved.z.shape[0] == 4 and saved.settings["mode"] == "invert"
    run(*start, "--resample", tmp_path / "edit.png", "--resample-positive", "sea", "--resample-cfg", 1)
    assert (pixels(tmp_path / "edit.png").int() - pixels(picture).int()).abs().float().mean() > 5


def test_reverse_takes_a_call_a_level_and_comes_back_less_near(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    near: dict[str, float] = {}
    for solver in ("exact", "reverse"):
        run(picture, *INVERT, "--solver", solver, "--report", tmp_path / f"{solver}.png")
        said = capsys.readouterr().err
        near[solver] = float(re.search(r"latents ([\d.]+) dB", said).group(1))
        assert solver == "exact" or "20 model calls for 20 levels" in said
    assert near["exact"] > 80 > near["reverse"] + 20
    assert Image.open(tmp_path / "exact.png").size == (720, 405)


def test_a_panel_shows_source_level_and_estimate(picture: Path, tmp_path: Path) -> None:
    there, frames, alone, later = (tmp_path / n for n in ("t.safetensors", "panels", "alone", "later"))
    run(picture, *INVERT, "--cfg", 1, "--steps", 5, "--panel", "--frames", frames, "--latents", there)
    run(picture, *INVERT, "--cfg", 1, "--steps", 5, "--frames", alone)
    run("--resume", there, "--frames", later)
    saved, prior = trajectory.load(there), make_model("gaussian", "sunset", 24, 32)
    panels = sorted(frames.iterdir())
    assert [p.name for p in panels] == [p.name for p in sorted(alone.iterdir())] and len(panels) == 6
    assert torch.equal(pixels(panels[0]), torch.cat([pixels(picture)] * 3, 1))
    for panel, z, sigma in zip(panels[1:], saved.z, saved.sigmas):
        source, shown, seen = pixels(panel).split(32, 1)
        assert torch.equal(source, pixels(picture)) and torch.equal(shown, pixels(alone / panel.name))
        truth = ((prior(z, sigma.reshape(1)).clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0)
        assert (seen - truth).abs().max() < 1
        assert (pixels(later / panel.name).int() - pixels(panel).int()).abs().max() <= 1


def test_an_inversion_sees_no_mask_and_its_frames_do(picture: Path, half_mask: Path, tmp_path: Path) -> None:
    masked, whole, frames = tmp_path / "m.safetensors", tmp_path / "w.safetensors", tmp_path / "frames"
    run(picture, *INVERT, *SHORT, "--latents", masked, "--mask", half_mask, "--frames", frames, "--view", "raw")
    run(picture, *INVERT, *SHORT, "--latents", whole)
    assert torch.equal(trajectory.load(masked).z[-1], trajectory.load(whole).z[-1])
    for frame in frames.iterdir():
        assert torch.equal(pixels(frame)[:, :16], pixels(picture)[:, :16])


def test_a_sampler_that_is_inverted_as_another_is_named(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    run(picture, "--mode", "invert", *SHORT, "--sampler", "dpmpp_sde", "--latents", tmp_path / "t.safetensors")
    assert "unsampler: dpmpp_sde adds noise at each step" in capsys.readouterr().err


def test_what_was_inverted_as_another_sampler_comes_back_by_it(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    """Euler a is inverted as Euler: sampled back by Euler a the picture would be lost (9.9 dB)."""
    there, back, again, other = (tmp_path / n for n in ("t.safetensors", "back.png", "again.png", "other.png"))
    invert = ("--mode", "invert", "--steps", 10)
    run(picture, *invert, "--sampler", "euler_ancestral", "--resample", back, "--latents", there)
    assert torch.equal(pixels(back), pixels(picture))
    said = capsys.readouterr().err
    assert "euler_ancestral adds noise at each step: inverted (exact) as euler, and sampled back by euler" in said
    run("--resume", there, "--resample", again)
    assert torch.equal(pixels(again), pixels(picture))
    assert "euler_ancestral was inverted as euler, and is sampled back by it" in capsys.readouterr().err
    run("--resume", there, "--resample", other, "--sampler", "euler_ancestral")
    assert "'euler_ancestral' is not 'euler', which was inverted: the picture will not come back" in (
        capsys.readouterr().err
    )
    assert not torch.equal(pixels(other), pixels(picture))


def test_what_did_not_converge_is_named(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    run(picture, *INVERT, *SHORT, "--max-calls", 1, "--latents", tmp_path / "t.safetensors")
    assert "step 3 (sigma 0.02917): 1 of 1 images not converged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sampler", "dpm_fast"), "sampler: 'dpm_fast' can not be inverted; choose one of euler, heun"),
        (("--noise", "path"), "noise: 'path' is not shared; with mode invert the model makes the noise"),
        (("--normalize",), "normalize: true does not go with mode invert"),
        (("--positive", "zebra"), "'zebra' is not a prompt"),
        (("--mode", "noise", "--panel"), "panel: true needs mode invert"),
        (("--mode", "noise", "--report", "r.png"), "report: needs mode invert"),
        (("--solver", "magic"), "solver: 'magic' is not one of exact, reverse"),
    ],
    ids=lambda o: "_".join(o)[2:40] if isinstance(o, tuple) else "",
)
def test_an_inversion_that_cannot_be_is_refused(
    options: tuple[str, ...], said: str, picture: Path, capsys: Capture
) -> None:
    assert said in refused(capsys, picture, "-o", "x.gif", "--mode", "invert", *options)


# Replay

REPLAY = ("--mode", "replay", "--steps", "6", "--positive", "sunset", "--negative", "night", "--cfg", "7")
EULER = (*REPLAY, "--sampler", "euler_ancestral")


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_replay_gives_the_picture_back_and_another_prompt_edits_it(
    sampler: str, masked: bool, picture: Path, half_mask: Path, tmp_path: Path
) -> None:
    """Pixel for pixel under the source's own prompt and scale; the edit is the same from the file."""
    mask = ("--mask", half_mask) if masked else ()
    start = (picture, *REPLAY, "--sampler", sampler, *mask)
    run(*start, "--resample", tmp_path / "own.png", "--latents", tmp_path / "t.safetensors")
    assert torch.equal(pixels(tmp_path / "own.png"), pixels(picture))
    sea = ("--resample-positive", "sea", "--resample-cfg", 3)
    run("--resume", tmp_path / "t.safetensors", "--resample", tmp_path / "later.png", *sea)
    run(*start, "--resample", tmp_path / "once.png", *sea)
    assert torch.equal(pixels(tmp_path / "later.png"), pixels(tmp_path / "once.png"))
    changed = (pixels(tmp_path / "once.png").int() - pixels(picture).int()).abs()
    assert changed[:, 16:].float().mean() > 5 and (int(changed[:, :16].max()) == 0) == masked


def test_skip_keeps_more_of_the_picture_now_or_later(picture: Path, tmp_path: Path) -> None:
    """It counts from end_at_step, and thinning the frames changes nothing."""
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    start = (*EULER, "--end-at-step", 1, "--step-increment", 2)
    run(picture, *start, "--latents", whole)
    run(picture, *start, "--latents", part, "--skip", 2)
    differences = []
    for skip in (0, 2, 3, 99):
        edit, again, own = (tmp_path / f"{name}.png" for name in ("edit", "again", "own"))
        run("--resume", whole, "--resample", edit, "--skip", skip, "--resample-positive", "sea")
        run(picture, *start, "--resample", again, "--skip", skip, "--resample-positive", "sea")
        assert (pixels(edit).int() - pixels(again).int()).abs().max() <= 1
        run("--resume", whole if skip < 2 else part, "--resample", own, "--skip", skip)
        assert torch.equal(pixels(own), pixels(picture))
        differences.append((pixels(edit).int() - pixels(picture).int()).abs().float().mean())
    assert differences == sorted(differences, reverse=True) and differences[-1] < 1 < 5 < differences[0]


def test_replay_shows_the_independent_levels(picture: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    run(picture, *EULER, "--latents", one)
    run(picture, "--steps", 6, "--noise", "independent", "--latents", other)
    assert torch.equal(trajectory.load(one).z, trajectory.load(other).z)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sampler", "euler"), "sampler: 'euler' adds no noise, which mode replay needs (one of euler_ancestral, "),
        ((), "sampler: 'euler' adds no noise"),
        (("--sampler", "dpmpp_sde", "--noise", "path"), "noise: 'path' is not independent"),
        (("--sampler", "dpmpp_sde", "--model", "gaussian-flow"), "wrong on a flow model"),
        (("--sampler", "dpmpp_2m_sde", "--skip", "99"), "skip: 'dpmpp_2m_sde' cannot sample a single step"),
        (("--sampler", "dpmpp_sde", "--positive", "zebra"), "'zebra' is not a prompt"),
        (("--mode", "noise", "--skip", "3"), "skip: 3 needs mode replay"),
    ],
    ids=lambda o: "_".join(o)[2:40] if isinstance(o, tuple) else "",
)
def test_what_cannot_be_replayed_is_refused(
    options: tuple[str, ...], said: str, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert said in refused(capsys, picture, "--mode", "replay", "--latents", tmp_path / "t.safetensors", *options)
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize(
    ("recorded", "resumed", "said"),
    [
        (("--skip", "2"), ("--skip", "1"), "skip: 1 is below 2, where the saved maps begin"),
        ((), ("--sampler", "dpmpp_sde"), "sampler: 'dpmpp_sde' is not 'euler_ancestral', which was recorded"),
        (("--sampler", "dpmpp_3m_sde"), ("--skip", "1"), "skip: 'dpmpp_3m_sde' looks back over its steps"),
        (("--mode", "noise"), ("--skip", "1"), "skip: 1 needs mode replay"),
    ],
    ids=["skip", "sampler", "multistep", "no maps"],
)
def test_what_saved_maps_cannot_do_is_refused(
    recorded: tuple[str, ...], resumed: tuple[str, ...], said: str, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    run(picture, *EULER, *recorded, "--latents", tmp_path / "t.safetensors")
    capsys.readouterr()
    frames = tmp_path / "frames"
    assert said in refused(capsys, "--resume", tmp_path / "t.safetensors", "--frames", frames, *resumed)
    assert not frames.exists()


# Several pictures


def test_a_folder_makes_a_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, "-o", out, "--frames", tmp_path / "frames", "--latents", tmp_path / "latents", *SHORT)
    assert {p.name for p in out.iterdir()} == {"a.gif", "b.gif"}
    assert {p.name for p in (tmp_path / "frames").iterdir()} == {"a", "b"}
    assert all(len(list(p.iterdir())) == 5 for p in (tmp_path / "frames").iterdir())
    seeds = [trajectory.load(tmp_path / "latents" / f"{n}.safetensors").seeds for n in "ab"]
    assert seeds == [(0,), (1,)]


def test_same_names_in_different_folders_stay_apart(folder: Path, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    run(folder / "b.png", other / "b.png", other, "-o", tmp_path / "out", *SHORT)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"b.gif", "b-2.gif", "a.gif", "b-3.gif"}


def test_a_picture_of_several_is_its_single_run(folder: Path, tmp_path: Path) -> None:
    """The next pictures count the seed up, so the second of a folder is the run with the next seed."""
    run(folder, "--latents", tmp_path / "many", "--seed", 7, *SHORT)
    run(folder / "b.png", "--latents", tmp_path / "one.safetensors", "--seed", 8, *SHORT)
    one, other = (trajectory.load(tmp_path / p) for p in ("many/b.safetensors", "one.safetensors"))
    assert torch.equal(one.z, other.z) and one.seeds == other.seeds == (8,) and one.settings == other.settings


# What goes in


def test_pictures_of_every_kind_are_read(tmp_path: Path) -> None:
    half = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    half.putpixel((0, 0), (10, 20, 30, 255))
    half.save(tmp_path / "a.png")
    x = load_picture(tmp_path / "a.png", 512)
    assert x.shape == (1, 3, 2, 4) and (x[0, :, 1, 1] == 1).all()  # transparency lies on white
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([10, 20, 30]) / 255 * 2 - 1)
    for mode in ("1", "L", "LA", "P", "I;16", "CMYK"):
        Image.new("L", (5, 3)).convert(mode if mode != "I;16" else "I").convert(mode).save(tmp_path / f"{mode[0]}.tiff")
        assert load_picture(tmp_path / f"{mode[0]}.tiff", 512).shape == (1, 3, 3, 5)


def test_a_turned_photograph_stands_upright_and_a_large_one_shrinks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (640, 320)).save(tmp_path / "a.jpg", exif=exif)
    assert load_picture(tmp_path / "a.jpg", 512).shape == (1, 3, 512, 256)
    assert load_picture(tmp_path / "a.jpg", 8192).shape == (1, 3, 640, 320)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5)], ids=str)
def test_the_smallest_and_odd_pictures_run(size: tuple[int, int], tmp_path: Path) -> None:
    Image.radial_gradient("L").resize(size).save(tmp_path / "a.png")
    outputs = ("-o", tmp_path / "a.gif", "--sheet", tmp_path / "s.png", "--resample", tmp_path / "r.png")
    run(tmp_path / "a.png", *outputs, "--steps", 1)
    assert Image.open(tmp_path / "r.png").size == size and Image.open(tmp_path / "a.gif").size == size


# Anything wrong


BAD_VALUES = [
    ("--steps", "many"), ("--steps", "-1"), ("--steps", "10001"), ("--steps", "1.5"), ("--cfg", "nan"),
    ("--end-at-step", "-2"), ("--step-increment", "0"), ("--noise", "loud"), ("--sampler", "ddim"),
    ("--scheduler", "linear"), ("--model", "sd15"), ("--duration", "0.01"), ("--duration", "inf"),
    ("--seed", str(2**63)), ("--view", "upside down"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), BAD_VALUES, ids=str)
def test_a_bad_value_is_answered_with_what_is_allowed(flag: str, value: str, picture: Path, capsys: Capture) -> None:
    name = flag[2:].replace("-", "_")
    (f,) = (f for f in surface_fields("cli") if f.name == name)
    assert refused(capsys, picture, "-o", "x.gif", flag, value) == f"{flag}: {value!r} is not {allowed(f)}"


def test_everything_wrong_comes_at_once(capsys: Capture) -> None:
    said = refused(capsys, "--steps", "x", "--noise", "loud", "--size", "3")
    assert all(word in said for word in ("steps: 'x'", "noise: 'loud'", "nothing to make", "PICTURE: none", "size: 3"))


def make_broken(tmp_path: Path) -> None:
    """Things that are not what a name says."""
    names = ("text.png", "cut.png", "empty.png", "a folder", "plain", "f.safetensors")
    paths = {name: tmp_path / name for name in names}
    paths["text.png"].write_text("no picture")
    whole = (ROOT / "lib_unsampler/assets/cat.jpg").read_bytes()
    paths["cut.png"].write_bytes(whole[: len(whole) // 2])
    paths["empty.png"].touch()
    paths["a folder"].mkdir()
    for link in ("loop", "loop.png"):
        (tmp_path / link).symlink_to(tmp_path / link)
    (tmp_path / "users").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "users" / "00000_sigma_0.0000.png")
    paths["plain"].write_text("a file")
    save_file({"z": torch.zeros(1)}, paths["f.safetensors"])


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


PICTURE = "picture.png"
GIF = ("-o", "x.gif")
FLOW_VP = ("--model", "gaussian-flow", "--scheduler", "vp")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no picture": (GIF, "PICTURE: none given"),
    "missing picture": (("no.png", *GIF), "no.png: no such picture"),
    "empty name": (("", *GIF), "an empty name"),
    "not a picture": (("text.png", *GIF), "text.png: not a readable picture"),
    "cut picture": (("cut.png", *GIF), "cut.png: not a readable picture"),
    "empty picture": (("empty.png", *GIF), "empty.png: not a readable picture"),
    "empty folder": (("a folder", "-o", "x"), "a folder: a folder without pictures"),
    "no output": ((PICTURE,), "nothing to make: name at least one of -o"),
    "unknown option": ((PICTURE, *GIF, "--stpes", "3"), "unrecognized arguments: --stpes"),
    "no value": ((PICTURE, "-o"), "expected one argument"),
    "size text": ((PICTURE, *GIF, "--size", "big"), "--size: invalid int value: 'big'"),
    "size": ((PICTURE, *GIF, "--size", "7"), "size: 7 is not a whole number from 8 to 8192"),
    "animation ending": ((PICTURE, "-o", "x.avi"), "x.avi does not end in .gif or .webp or .apng or .png or .mp4"),
    "png ending": ((PICTURE, "--resample", "x.jpg"), "x.jpg does not end in .png"),
    "file ending": ((PICTURE, "--latents", "x.pt"), "x.pt does not end in .safetensors"),
    "several into one file": ((PICTURE, "in/b.png", "-o", "x.gif"), "-o: 2 pictures do not go into one file; x.gif/"),
    "no ending": ((PICTURE, "-o", "x"), "-o: x does not end in .gif or .webp or .apng or .png or .mp4, nor in /"),
    "format of a file": ((PICTURE, *GIF, "--format", "webp"), "--format: webp is not what x.gif ends in"),
    "inside a file": ((PICTURE, *GIF, "--sheet", "x.gif/s.png"), "--sheet: x.gif/s.png lies inside the file of -o"),
    "a frame's name": (
        (PICTURE, "--frames", "f", "--sheet", "f/00000_sigma_0.0000.png"),
        "--sheet: f/00000_sigma_0.0000.png has the name of a frame",
    ),
    "a long name": ((PICTURE, *GIF, "--curve", "n" * 300 + ".png"), "File name too long"),
    "a loop of links": ((PICTURE, *GIF, "--curve", "loop/x.png"), "--curve: loop/x.png: Too many levels"),
    "a link to itself": ((PICTURE, *GIF, "--curve", "loop.png"), "--curve: loop.png: Too many levels"),
    "cfg below 0": (
        (PICTURE, "--resample", "x.png", "--resample-cfg", "-0.5"),
        "--resample-cfg: '-0.5' is not as cfg (-1), or a number from 0 to 100",
    ),
    "not our frame": (
        (PICTURE, "--frames", "users", "--steps", "1"),
        "users/00000_sigma_0.0000.png was not written by this program; name another folder",
    ),
    "folder is a file": ((PICTURE, "--frames", "plain"), "plain is a file, where a folder is needed"),
    "folder for many is a file": ((PICTURE, "in", "-o", "plain"), "plain is a file, where a folder is needed"),
    "below a file": ((PICTURE, "-o", "plain/x.gif"), "plain/x.gif cannot be made"),
    "frames below a file": ((PICTURE, "--frames", "plain/x/y"), "plain is a file"),
    "overwrites source": ((PICTURE, "--resample", PICTURE), "picture.png would overwrite what it is made from"),
    "overwrites a folder's source": (("in", "--resample", "in"), "in/b.png would overwrite what it is made from"),
    "frames beside the source": ((PICTURE, "--frames", "."), "would overwrite what it is made from"),
    "overwrites mask": ((PICTURE, "--sheet", "m.png", "--mask", "m.png"), "m.png would overwrite what"),
    "overwrites trajectory": (("--resume", "t.gif", "-o", "./t.gif"), "t.gif would overwrite what"),
    "two of a name": ((PICTURE, "--sheet", "x.png", "--curve", "./x.png"), "x.png is the output of --sheet too"),
    "two folders of a name": ((PICTURE, "in", "--sheet", "x", "--curve", "x"), "is the output of --sheet too"),
    "missing mask": ((PICTURE, *GIF, "--mask", "no.png"), "no.png: No such file"),
    "mask is no picture": ((PICTURE, *GIF, "--mask", "text.png"), "text.png: not a readable picture"),
    "prompt": ((PICTURE, "--resample", "x.png", "--positive", "zebra"), "'zebra' is not a prompt"),
    "negative": ((PICTURE, "--resample", "x.png", "--negative", "zebra"), "'zebra' is not a prompt"),
    "vp on flow": ((PICTURE, *GIF, *FLOW_VP), "scheduler: 'vp'"),
    "last seed of two": ((PICTURE, "in", "-o", "x", "--seed", f"{2**63 - 1}"), f"seed: {2**63} is not"),
    "nothing to resume": (("--resume", "no", *GIF), "no: no such file"),
    "foreign file": (("--resume", "f.safetensors", *GIF), "f.safetensors: a safetensors file, but not a Batch"),
    "resuming text": (("--resume", "plain", *GIF), "plain: not a readable trajectory"),
    "resume with a picture": ((PICTURE, "--resume", "x", *GIF), "PICTURE: does not go with --resume"),
    "resume with other noise": (("--resume", "x", *GIF, "--noise", "path"), "noise: is what the resumed"),
    "resume to itself": (("--resume", "x", "--latents", "y.safetensors"), "latents: the resumed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_wrong_is_one_line_and_leaves_nothing(
    case: str, picture: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_broken(tmp_path)
    for name in ("m.png", "t.gif", "in/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    arguments, said = WRONG[case]
    assert said in refused(capsys, *arguments)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_are_refused_on_flow(sampler: str, picture: Path, tmp_path: Path, capsys: Capture) -> None:
    flow = ("--model", "gaussian-flow", "--sampler", sampler)
    assert f"sampler: '{sampler}'" in refused(capsys, picture, "--resample", tmp_path / "x.png", *flow)


def two_images(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors.update(z=tensors["z"].repeat(1, 2, 1, 1, 1), source=tensors["source"].repeat(2, 1, 1, 1))
    metadata.update(seeds="[1, 2]")


ODD: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], None], str]] = {
    "model": (lambda t, m: m.update(info="{}"), "not an embedded one"),
    "settings": (lambda t, m: m.update(settings=json.dumps({"steps": "x"})), "steps: 'x' is not"),
    "batch": (two_images, "not one picture's"),
    "video": (lambda t, m: t.update(z=t["z"].unsqueeze(3), source=t["source"].unsqueeze(2)), "not one picture's"),
    "sigmas": (lambda t, m: t.update(sigmas=t["sigmas"] * 0.5), "t.safetensors: "),
    "newer": (lambda t, m: m.update(version="3"), "newer"),
}


@pytest.mark.parametrize("case", ODD)
def test_resuming_an_odd_trajectory_is_one_line(case: str, picture: Path, tmp_path: Path, capsys: Capture) -> None:
    path, (damage, said) = tmp_path / "t.safetensors", ODD[case]
    run(picture, "--latents", path, *SHORT)
    capsys.readouterr()
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
    damage(tensors, metadata)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    assert said in refused(capsys, "--resume", path, "-o", tmp_path / "x.gif", "--resample", tmp_path / "x.png")


def test_a_resumed_pickle_is_never_read(tmp_path: Path, capsys: Capture) -> None:
    torch.save({"z": torch.zeros(1)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(["z"]))
    for name in ("a.pt", "b.pt"):
        assert "not a readable trajectory" in refused(capsys, "--resume", tmp_path / name, "-o", tmp_path / "x.gif")


# Help, and being stopped


def test_help_is_documentation_of_every_field() -> None:
    text = " ".join(make_parser().format_help().split())
    for f in surface_fields("cli"):
        assert f"--{f.name.replace('_', '-')}" in text, f.name
        unbroken = text.replace(" ", "").replace("-", "")
        for words in (f.metadata["help"], f"Allowed: {allowed(f)}"):
            assert words.replace(" ", "").replace("-", "") in unbroken, f.name


@pytest.mark.parametrize("argument", ["--help", "--version", "--steps=x", "--bogus"])
def test_help_and_errors_come_without_torch(argument: str) -> None:
    program = (
        "import sys\nfrom lib_unsampler.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print('status', end.code, *({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == ("status 0" if argument in ("--help", "--version") else "status 2")
    assert done.stderr.count("\n") == (0 if argument in ("--help", "--version") else 1)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a whole console")
def test_ctrl_c_leaves_no_half_written_file(picture: Path, tmp_path: Path) -> None:
    out, gif = tmp_path / "frames", tmp_path / "x.gif"
    gif.write_bytes(b"the old one")
    command = [sys.executable, "-m", "lib_unsampler", picture, "-o", gif, "--frames", out, "--steps", "10000"]
    process = subprocess.Popen(
        [str(c) for c in command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(out.glob("*.png"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("unsampler: interrupted")
    assert not list(tmp_path.rglob(".*")) and gif.read_bytes() == b"the old one"
    for frame in out.iterdir():
        assert pixels(frame).shape == (24, 32, 3)


# How the animation is made


def playing(path: Path) -> tuple[list[np.ndarray], list[float]]:
    with Image.open(path) as picture:
        frames, times = [], []
        for i in range(picture.n_frames):
            picture.seek(i)
            picture.load()
            frames.append(np.asarray(picture.convert("RGB"), float))
            times.append(picture.info["duration"])
    return frames, times


@pytest.mark.parametrize("ending", [".gif", ".webp", ".apng", ".png"])
def test_the_ending_is_the_format_and_every_option_is_heard(ending: str, picture: Path, tmp_path: Path) -> None:
    out, frames = tmp_path / f"x{ending}", tmp_path / "f"
    timed = ("--duration", "0.5", "--timing", "log sigma", "--hold-first", "1", "--hold-last", "2")
    run(picture, "-o", out, "--frames", frames, *SHORT, *timed, "--ping-pong", "--reverse", "--loop", "3")
    stills = [pixels(p).double().numpy() for p in sorted(frames.iterdir())]
    moving, times = playing(out)
    order = [4, 3, 2, 1, 0, 1, 2, 3]
    grey = [0.3, 0.59, 0.11]  # WebP and video halve the colour's resolution, where noise has most of its energy
    distance = np.array([[np.abs((m - s) @ grey).mean() for s in stills] for m in moving])
    assert (distance.argmin(1) == order).all()
    sigmas = get_sigmas("karras", 4, "eps")[:-1].double().log().flip(0).diff().tolist()
    shares = np.array([sigmas[0], sum(sigmas[:2]) / 2, sum(sigmas[1:]) / 2, sigmas[2]])
    seconds = np.array([0.5, *(0.5 * 4 * shares / shares.sum())])[order]
    seconds[0] += 1
    seconds[4] += 2
    assert np.abs(np.cumsum(times) - 1000 * np.cumsum(seconds)).max() <= (5 if ending == ".gif" else 0.5) + 1e-6
    with Image.open(out) as picture_read:
        assert picture_read.info["loop"] == (2 if ending == ".gif" else 3)


def test_a_video_is_written_where_pyav_is(picture: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    run(picture, "-o", tmp_path / "x.mp4", *SHORT, "--hold-last", "1")
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert "Batch Unsampler, Unsampler steps: 4" in container.metadata["comment"]
        times = [frame.time for frame in container.decode(video=0)]
        assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4]) and container.duration == 1_500_000


def test_without_pyav_a_video_is_refused_in_one_line(
    picture: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install av" in refused(capsys, picture, "-o", tmp_path / "x.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_captions_are_written_below_every_frame_and_into_no_latent(picture: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.open(picture).resize((320, 240)).save(large)
    bare, captioned = tmp_path / "bare", tmp_path / "captioned"
    for folder, options in ((bare, ()), (captioned, ("--captions",))):
        run(large, "--frames", folder, "--latents", folder / "t.safetensors", *SHORT, *options)
    for one, other in zip(sorted(bare.glob("*.png")), sorted(captioned.glob("*.png"))):
        changed = (pixels(one) != pixels(other)).any(-1).any(-1).nonzero()
        assert changed.min() > 0.85 * 240 and changed.max() == 239
    one, other = (trajectory.load(folder / "t.safetensors") for folder in (bare, captioned))
    assert torch.equal(one.z, other.z)


@pytest.mark.parametrize("ending", [".gif", ".apng", ".webp"])
def test_a_long_run_holds_few_frames(
    ending: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Image.Image]] = []
    alive, own = [], render.to_pictures

    def watched(decoded: Tensor) -> list[Image.Image]:
        pictures = own(decoded)
        made.extend(map(weakref.ref, pictures))
        alive.append(sum(ref() is not None for ref in made))
        return pictures

    monkeypatch.setattr(render, "to_pictures", watched)
    monkeypatch.setattr(running, "CHUNK_VALUES", 3 * 32 * 24 * 4)
    everything = ("-o", tmp_path / f"x{ending}", "--frames", tmp_path / "f", "--sheet", tmp_path / "s.png")
    run(picture, *everything, "--latents", tmp_path / "t.safetensors", "--steps", 300, "--reverse", "--noise", "path")
    assert len(made) == 301 and max(alive) < 60
    assert len(playing(tmp_path / f"x{ending}")[0]) == 301


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.parametrize(
    "target", [("-o", "x.gif"), ("-o", "x.mp4"), ("--latents", "x.safetensors"), ("--frames", "f")]
)
@pytest.mark.one_of(2)
def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    target: tuple[str, str], picture: Path, tmp_path: Path
) -> None:
    if target[1] == "x.mp4":
        pytest.importorskip("av")
    large = tmp_path / "large.png"
    Image.effect_noise((400, 400), 90).convert("RGB").save(large)
    limit = 1_000_000 if target[0] == "--latents" else 200_000 if target[0] == "-o" else 100_000
    command = [sys.executable, "-m", "lib_unsampler", large, target[0], tmp_path / target[1], "--steps", "12"]

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, preexec_fn=small_disk)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("unsampler: error: [Errno 27] File too large: ") and target[1].rstrip("f") in last
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p not in (large, picture)]

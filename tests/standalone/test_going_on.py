"""The batch goes on from the command line: guide, film, strength sweep and ComfyUI's file, against the closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from k_diffusion.external import DiscreteSchedule
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_unsampler.core import comfy, trajectory
from lib_unsampler.core.trajectory import Trajectory
from lib_unsampler.pictures import render
from lib_unsampler.standalone import cli
from lib_unsampler.standalone.embedded import make_model
from lib_unsampler.standalone.reading import load_picture
from lib_unsampler.standalone.sampling import get_sigmas, timestep

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
Capture = pytest.CaptureFixture[str]
PREDICTIONS = {"gaussian": "eps", "gaussian-flow": "flow"}


def run(*arguments: object) -> None:
    """A run that must succeed."""
    assert cli.main([str(a) for a in arguments]) == 0


def refused(capsys: Capture, *arguments: object) -> str:
    """What a run that must end with status 2 says."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 + err.count("loading PyTorch\n")
    return err


def pixels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))


def shown(latent: Tensor) -> Tensor:
    """The picture of a latent, as float pixel values before rounding."""
    return ((latent.double().clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0)


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Everything that is turned into pictures; the picture sampled back is the last."""
    seen: list[Tensor] = []
    own = render.to_pictures
    monkeypatch.setattr(render, "to_pictures", lambda made: seen.append(made.clone()) or own(made))
    return seen


def shared_z(picture: Path, sigmas: Tensor, prediction: str = "eps", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(source, z of every noisy level, noisiest first), from the definition."""
    x = load_picture(picture, 512)
    n = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([(1 - s if prediction == "flow" else 1) * x + s * n for s in sigmas[:-1]])


# Guide


def test_the_timestep_is_k_diffusions_of_sd_1() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    table = DiscreteSchedule(((1 - kept) / kept).sqrt(), quantize=False)
    for sigma in (0.01, 0.0291675, 0.1, 1.0, 5.3, 14.61, 40.0):
        theirs = float(table.sigma_to_t(torch.tensor([sigma], dtype=torch.float64)))
        assert timestep(sigma, "eps") == pytest.approx(theirs, abs=1e-6)
    assert timestep(0.37, "flow") == pytest.approx(370)


@pytest.mark.parametrize("model", PREDICTIONS)
def test_guided_euler_is_the_recursion_written_out(model: str, picture: Path, tmp_path: Path, latents: list) -> None:
    """x <- c z + (1 - c) x, then Euler's step from there; c of the model's timestep, within the guided share."""
    given = ("--guide", "--guide-alpha", 2, "--guide-strength", 0.6, "--guide-until", 0.7, "--end-at-step", 1)
    run(picture, "--resample", tmp_path / "r.png", "--steps", 8, "--model", model, "--positive", "sea", *given)
    prediction = PREDICTIONS[model]
    sigmas = get_sigmas("karras", 8, prediction)
    _, z = shared_z(picture, sigmas, prediction)
    prior, x = make_model(model, "sea", 24, 32), z[1]
    for step in range(1, 8):
        s, t = sigmas[step], timestep(float(sigmas[step]), prediction)
        c = 0.6 * ((1 + np.cos(np.pi * (1000 - t) / 1000)) / 2) ** 2 if (step - 1) / 7 <= 0.7 else 0.0
        x = c * z[step] + (1 - c) * x
        x = x + (x - prior(x, s.reshape(1))) / s * (sigmas[step + 1] - s)
    torch.testing.assert_close(latents[-1], x.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["noise", "invert"])
def test_the_whole_weight_is_the_estimate_of_the_least_noisy_level(
    mode: str, picture: Path, tmp_path: Path, latents: list
) -> None:
    file = tmp_path / "t.safetensors"
    whole = ("--guide", "--guide-alpha", 0, "--resample", tmp_path / "r.png", "--resample-positive", "sunset")
    run(picture, "--steps", 7, "--mode", mode, "--latents", file, *whole)
    saved = trajectory.load(file)
    truth = make_model("gaussian", "sunset", 24, 32)(saved.z[0], saved.sigmas[:1])
    torch.testing.assert_close(latents[-1], truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "heun"])
def test_strength_0_is_no_guide_bit_for_bit_and_1_is_another_picture(
    sampler: str, picture: Path, tmp_path: Path, latents: list
) -> None:
    made = []
    for options in ((), ("--guide", "--guide-strength", 0), ("--guide",)):
        run(picture, "--steps", 5, "--sampler", sampler, "--resample", tmp_path / "r.png", *options)
        made.append(latents[-1])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("options", "kept"),
    [((), 1), (("--seed", 5, "--normalize"), 3), (("--mode", "invert", "--sampler", "heun"), 1)],
    ids=["shared", "thinned", "inverted"],
)
def test_a_resumed_file_guides_as_the_run_itself(
    options: tuple, kept: int, picture: Path, tmp_path: Path, latents: list
) -> None:
    file, guide = tmp_path / "t.safetensors", ("--guide", "--guide-alpha", 1)
    run(picture, "--steps", 6, *options, "--step-increment", kept, "--latents", file)
    run("--resume", file, "--resample", tmp_path / "a.png", *guide)
    later = latents[-1]
    run(picture, "--steps", 6, *options, *guide, "--resample", tmp_path / "b.png")
    torch.testing.assert_close(later, latents[-1], rtol=0, atol=0 if kept == 1 else 1e-5)


def test_a_file_that_was_made_with_a_guide_resumes_with_it_or_without(picture: Path, tmp_path: Path) -> None:
    file, own, again, bare, plain = (tmp_path / n for n in ("t.safetensors", "a.png", "b.png", "c.png", "d.png"))
    run(picture, "--steps", 5, "--guide", "--latents", file, "--resample", own)
    run("--resume", file, "--resample", again)
    run("--resume", file, "--resample", bare, "--no-guide")
    run(picture, "--steps", 5, "--resample", plain)
    assert torch.equal(pixels(own), pixels(again)) and torch.equal(pixels(bare), pixels(plain))
    assert not torch.equal(pixels(own), pixels(bare))


REFUSED = [
    (("--noise", "independent"), "--noise: 'independent' does not go with guide"),
    (("--noise", "path"), "--noise: 'path' does not go with guide"),
    (("--mode", "replay", "--sampler", "euler_ancestral"), "--guide: true does not go with mode replay"),
    (("--guide-from", 0.8, "--guide-until", 0.2), "--guide-from: 0.8 is above --guide-until, 0.2"),
    (("--sampler", "dpm_fast"), "--sampler: 'dpm_fast' chooses its own steps and cannot be guided"),
    (("--sampler", "dpm_adaptive"), "--sampler: 'dpm_adaptive' chooses its own steps and cannot be guided"),
    (("--sweep", "s.gif"), "--sweep does not go with guide"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda o: "_".join(map(str, o))[2:30])
def test_what_cannot_guide_is_refused_by_name(options: tuple, said: str, picture: Path, capsys: Capture) -> None:
    assert said in refused(capsys, picture, "--resample", "r.png", "--guide", "--steps", 4, *options)


def test_a_file_that_cannot_guide_is_refused(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "t.safetensors"
    run(picture, "--mode", "invert", "--steps", 6, "--step-increment", 2, "--latents", file)
    capsys.readouterr()
    assert "it lacks 3 of the levels" in refused(capsys, "--resume", file, "--resample", tmp_path / "r.png", "--guide")
    run(picture, "--noise", "path", "--steps", 4, "--latents", file)
    capsys.readouterr()
    assert "'path' does not go with guide" in refused(capsys, "--resume", file, "--resample", "r.png", "--guide")


def test_what_a_guide_does_not_use_is_said(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    back = (picture, "--steps", 3, "--resample", tmp_path / "r.png")
    run(*back, "--guide-strength", 0.5, "--film", "both", "--film-view", "estimate")
    said = capsys.readouterr().err
    assert "--guide-strength: has no effect without guide" in said
    assert "--film: has no effect without --frames or -o or --sheet" in said
    run(*back, "--guide", "--guide-strength", 0.5, "--frames", tmp_path / "f", "--film-view", "estimate")
    said = capsys.readouterr().err
    assert "--film-view: has no effect with film noising" in said and "guide" not in said
    run(picture, "--steps", 3, "--frames", tmp_path / "f", "--guide", "--latent-format", "sd15")
    said = capsys.readouterr().err
    assert "--guide: has no effect without --resample" in said
    assert "--latent-format: has no effect without --comfyui" in said


# End at sigma


@pytest.mark.parametrize(("sigma", "step"), [(3.0, None), (1e-3, 7), (100.0, 0)])
def test_end_at_sigma_is_the_noisiest_level_at_or_below(
    sigma: float, step: int | None, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, sigmas = tmp_path / "t.safetensors", get_sigmas("karras", 8, "eps")
    run(picture, "--steps", 8, "--end-at-sigma", sigma, "--latents", file)
    saved = trajectory.load(file)
    assert saved.start == (int((sigmas > sigma).sum()) if step is None else step)
    assert saved.sigmas[-1] == sigmas[saved.start] and len(saved.z) == 8 - saved.start
    told = "--end-at-sigma: 0.001 is below the lowest level; it ends at 0.02917"
    assert (told in capsys.readouterr().err) == (sigma == 1e-3)


def test_two_ends_are_refused(picture: Path, capsys: Capture) -> None:
    said = refused(capsys, picture, "-o", "x.gif", "--end-at-sigma", 3, "--end-at-step", 2)
    assert "--end-at-sigma: 3 and --end-at-step: 2 both say where to stop" in said


# Film


@pytest.mark.parametrize("view", ["state", "estimate"])
def test_the_film_is_the_sampling_step_by_step(view: str, picture: Path, tmp_path: Path) -> None:
    """Euler's states from the closed form, in the variance-preserving view, or D of them; then the picture."""
    frames, back, other = tmp_path / "f", tmp_path / "r.png", tmp_path / "other.png"
    given = ("--steps", 6, "--positive", "sea", "--end-at-step", 1)
    run(picture, *given, "--resample", back, "--frames", frames, "--film", "both", "--film-view", view)
    run(picture, *given, "--resample", other)
    run(picture, *given, "--frames", tmp_path / "noising")
    assert torch.equal(pixels(back), pixels(other))  # filming changes nothing
    sigmas = get_sigmas("karras", 6, "eps")
    _, z = shared_z(picture, sigmas)
    prior, x = make_model("gaussian", "sea", 24, 32), z[1]
    files = sorted(frames.iterdir())
    assert len(files) == 6 + 5 + 1
    for one, noised in zip(files[:6], sorted((tmp_path / "noising").iterdir())):
        assert one.name == noised.name and torch.equal(pixels(one), pixels(noised))
    for step, file in zip(range(1, 6), files[6:-1]):
        s = sigmas[step]
        seen = prior(x, s.reshape(1))
        truth = shown(seen if view == "estimate" else x / (1 + s**2).sqrt())
        assert file.name.endswith(f"_sigma_{s:.4f}.png") and (pixels(file) - truth).abs().max() < 0.51
        x = x + (x - seen) / s * (sigmas[step + 1] - s)
    assert torch.equal(pixels(files[-1]), pixels(back)) and files[-1].name.endswith("_sigma_0.0000.png")


@pytest.mark.parametrize(
    "options",
    [
        ("--mode", "invert", "--sampler", "heun"),
        ("--mode", "replay", "--sampler", "euler_ancestral", "--skip", 2),
        ("--sampler", "dpmpp_2m_sde", "--guide", "--step-increment", 2),
        ("--sampler", "dpmpp_sde", "--end-at-step", 5),
    ],
    ids=lambda o: "_".join(map(str, o))[2:30],
)
def test_every_resampling_is_filmed_now_or_later(options: tuple, picture: Path, tmp_path: Path) -> None:
    """The sampling alone: as many frames as kept levels that are sampled, and the picture; the file tells the same."""
    file, back, own, later = (tmp_path / n for n in ("t.safetensors", "r.png", "own", "later"))
    film = ("--film", "sampling")
    run(picture, "--steps", 6, *options, *film, "--resample", back, "--frames", own, "--latents", file)
    run("--resume", file, "--resample", tmp_path / "b.png", "--frames", later)
    sampled = {"invert": 6, "replay": 4, "dpmpp_2m_sde": 3, "dpmpp_sde": 1}[options[1]]
    names = [p.name for p in sorted(own.iterdir())]
    assert len(names) == sampled + 1 and names == [p.name for p in sorted(later.iterdir())]
    assert all(torch.equal(pixels(own / n), pixels(later / n)) for n in names)
    assert torch.equal(pixels(own / names[-1]), pixels(back))
    sigmas = [float(name[12:-4]) for name in names]
    assert sigmas == sorted(sigmas, reverse=True)


def test_the_animation_goes_there_and_back(picture: Path, tmp_path: Path) -> None:
    run(picture, "--steps", 4, "--resample", tmp_path / "r.png", "--film", "both", "-o", tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 1 + 4 + 4 + 1


def test_a_film_that_cannot_be_is_refused_or_named(picture: Path, tmp_path: Path, capsys: Capture) -> None:
    film = (picture, "--frames", tmp_path / "f", "--film", "sampling", "--steps", 4)
    adaptive = refused(capsys, *film, "--resample", "r.png", "--sampler", "dpm_adaptive")
    assert "--film: sampling needs a sampler that walks the schedule; 'dpm_adaptive' chooses its own steps" in adaptive
    run(*film)
    assert "--film: has no effect without --resample" in capsys.readouterr().err
    assert len(list((tmp_path / "f").iterdir())) == 5


# Strength sweep


@pytest.mark.parametrize(("sampler", "named"), [("euler", False), ("heun", False), ("dpmpp_2m", True)])
def test_a_sweep_of_an_inversion_names_a_sampler_without_its_history(
    sampler: str, named: bool, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, swept = tmp_path / "t.safetensors", f"{tmp_path / 'swept'}/"
    run(picture, "--steps", 4, "--mode", "invert", "--sampler", sampler, "--sweep", swept, "--latents", file)
    assert ("--sweep: dpmpp_2m looks back over its steps" in capsys.readouterr().err) is named
    run("--resume", file, "--sweep", swept)
    assert ("--sweep: dpmpp_2m looks back over its steps" in capsys.readouterr().err) is named


@pytest.mark.parametrize(
    "options",
    [
        ("--sampler", "dpmpp_2m_sde"),
        ("--sampler", "euler_ancestral", "--noise", "path"),
        ("--model", "gaussian-flow", "--sampler", "heun", "--positive", "sea"),
        ("--mode", "invert", "--sampler", "euler"),
    ],
    ids=lambda o: "_".join(o)[2:40],
)
def test_a_sweeps_pictures_are_the_resamplings_of_their_levels(options: tuple, picture: Path, tmp_path: Path) -> None:
    swept, moving = tmp_path / "swept", tmp_path / "s.apng"
    given = ("--steps", 5, *options, "--resample-positive", "sunset")
    run(picture, *given, "--sweep", f"{swept}/", "--latents", tmp_path / "t.safetensors")
    run("--resume", tmp_path / "t.safetensors", "--sweep", moving)
    files = sorted(swept.iterdir())
    assert len(files) == 5
    with Image.open(moving) as animated:
        for number, file in enumerate(files):
            alone = tmp_path / f"{number}.png"
            run(picture, *given, "--end-at-step", 4 - number, "--resample", alone)
            assert torch.equal(pixels(file), pixels(alone))
            animated.seek(number)
            assert np.array_equal(np.array(animated.convert("RGB")), pixels(alone).numpy())


def test_a_sweep_of_a_mask_and_of_several_pictures(picture: Path, tmp_path: Path) -> None:
    mask, photos, out = Image.new("L", (32, 24), 0), tmp_path / "photos", tmp_path / "out"
    mask.paste(255, (16, 0, 32, 24))
    mask.save(tmp_path / "m.png")
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.open(picture).save(photos / name)
    run(photos, "--steps", 3, "--sweep", out, "--mask", tmp_path / "m.png")
    for name in ("a", "b"):
        files = sorted((out / name).iterdir())
        assert len(files) == 3
        assert all(torch.equal(pixels(file)[:, :16], pixels(picture)[:, :16]) for file in files)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--film", "both"), "--film: 'both' does not go with strength sweep"),
        (("--mode", "replay", "--sampler", "euler_ancestral"), "--sweep does not go with mode replay"),
        (("--sweep", "x.avi"), "--sweep: x.avi does not end in .gif"),
    ],
    ids=["film", "replay", "ending"],
)
def test_a_sweep_that_cannot_be_is_refused(options: tuple, said: str, picture: Path, capsys: Capture) -> None:
    assert said in refused(capsys, picture, "--sweep", "s.gif", "--steps", 4, *options)


def test_a_sweep_leaves_the_films_and_guides_of_a_saved_run_aside(picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    made = ("--guide", "--film", "both", "--frames", tmp_path / "f", "--resample", tmp_path / "r.png")
    run(picture, "--steps", 3, *made, "--latents", file)
    run("--resume", file, "--sweep", tmp_path / "s.gif")
    with Image.open(tmp_path / "s.gif") as gif:
        assert gif.n_frames == 3


# ComfyUI


@pytest.fixture
def from_webui(tmp_path: Path, latent: Callable[..., Tensor]) -> Callable[..., tuple[Path, Trajectory]]:
    """Writes a latents file as the WebUI does, of any number of channels."""

    def make(channels: int, prediction: str, form: str, high: float = 0.9) -> tuple[Path, Trajectory]:
        x = latent(2, channels, 3, 5)
        sigmas = torch.tensor([0.2, 0.5, high])
        saved = Trajectory(
            z=torch.stack([x + s for s in sigmas]),
            sigmas=sigmas,
            schedule=torch.tensor([high, 0.5, 0.2, 0.0]),
            start=0,
            source=x,
            prediction=prediction,
            seeds=(3, 4),
            info={"model": "dreamer", **({"latent format": form} if form else {})},
        )
        trajectory.save(saved, tmp_path / "webui.safetensors")
        return tmp_path / "webui.safetensors", saved

    return make


def test_the_known_formats_are_cores() -> None:
    assert set(cli.LATENT_FORMATS) == set(comfy.SCALES)


@pytest.mark.parametrize(
    ("form", "channels", "prediction", "named"),
    [("sd15", 4, "eps", True), ("sdxl", 4, "v", False), ("sd3", 16, "flow", False), ("flux", 16, "flow", True)],
)
def test_comfyui_s_file_holds_every_level_frame_by_frame(
    form: str, channels: int, prediction: str, named: bool, from_webui: Callable, tmp_path: Path
) -> None:
    """What its sampler is handed, process_in and noise_scaling done by hand, is our z."""
    file, saved = from_webui(channels, prediction, form if named else "")
    out = tmp_path / "levels.latent"
    run("--resume", file, "--comfyui", out, *(() if named else ("--latent-format", form)))
    with safe_open(out, framework="pt") as read:
        assert "latent_format_version_0" in set(read.keys())
        held, told = read.get_tensor("latent_tensor"), json.loads(read.metadata()["batch_unsampler"])
    scale, shift = comfy.SCALES[form]
    signal = 1 - saved.sigmas if prediction == "flow" else torch.ones(3)
    handed = (held.reshape(3, 2, channels, 3, 5) - shift) * scale * signal.reshape(3, 1, 1, 1, 1)
    torch.testing.assert_close(handed, saved.z, rtol=1e-5, atol=1e-5)
    assert told["sigmas"] == saved.sigmas.tolist() and told["latent_format"] == form


def test_what_comfyui_s_file_cannot_hold_is_refused_by_name(
    from_webui: Callable, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "x.latent"
    assert "--comfyui: the embedded models' latents are pixels" in refused(capsys, picture, "--comfyui", out)
    run(picture, "--steps", 3, "--latents", tmp_path / "own.safetensors")
    capsys.readouterr()
    assert "latents are pixels" in refused(capsys, "--resume", tmp_path / "own.safetensors", "--comfyui", out)
    file, _ = from_webui(16, "flow", "flux", 1.0)
    assert "sigma 1 is pure noise" in refused(capsys, "--resume", file, "--comfyui", out)
    assert "sd15 has 4 channels" in refused(capsys, "--resume", file, "--comfyui", out, "--latent-format", "sd15")
    both = refused(capsys, "--resume", file, "--comfyui", out, "--curve", tmp_path / "c.png")
    assert "--curve: " in both and "of which only --comfyui can be made" in both
    file, _ = from_webui(4, "eps", "")
    assert "name it with --latent-format (sd15, " in refused(capsys, "--resume", file, "--comfyui", out)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as read:
        first = {**read.metadata(), "version": "1"}
    save_file({**tensors, "mask": torch.ones(1, 1, 3, 5), "handoff": tensors["z"][-1].clone()}, file, first)
    assert "are masked (format 1)" in refused(capsys, "--resume", file, "--comfyui", out)
    assert not out.exists()


def test_an_earlier_webui_s_file_becomes_comfyui_s(tmp_path: Path) -> None:
    saved = trajectory.load(SAMPLES / "webui-0.1.0.safetensors")
    assert saved.source.shape[1] == 4
    run("--resume", SAMPLES / "webui-0.1.0.safetensors", "--comfyui", tmp_path / "x.latent", "--latent-format", "sd15")
    with safe_open(tmp_path / "x.latent", framework="pt") as read:
        assert read.get_tensor("latent_tensor").shape[0] == len(saved.z) * len(saved.source)

"""What the double and the extension take for granted of the host, held to a real checkout's source.

Name checkouts with ``A1111_DIR``, ``FORGE_DIR``, ``REFORGE_DIR``, ``CLASSIC_DIR`` and ``NEO_DIR``; what is
not named is skipped.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_unsampler.core.noising import SeededDraws, unsample, walk
from lib_unsampler.core.replay import record, replay
from lib_unsampler.core.schedule import levels
from lib_unsampler.standalone.embedded import guided, make_model

DOUBLE = Path(__file__).resolve().parent / "host_double/modules"


@pytest.fixture(params=["A1111_DIR", "FORGE_DIR", "REFORGE_DIR", "CLASSIC_DIR", "NEO_DIR"])
def host(request: pytest.FixtureRequest) -> Path:
    """A named checkout's ``modules``."""
    folder = os.environ.get(request.param)
    if not folder:
        pytest.skip(f"{request.param} names no checkout of the WebUI")
    return Path(folder) / "modules"


SAME_SIGNATURE = {
    "images.py": ["save_image"],
    "processing.py": [
        "decode_latent_batch",
        "apply_overlay",
        "create_infotext",
        "process_images",
        "StableDiffusionProcessingImg2Img.init",
        "StableDiffusionProcessingImg2Img.sample",
        "StableDiffusionProcessing.save_samples",
        "StableDiffusionProcessing.comment",
        "StableDiffusionProcessing.close",
    ],
    "rng.py": ["ImageRNG.__init__", "ImageRNG.first", "ImageRNG.next", "randn", "slerp", "create_generator"],
    "sd_samplers.py": ["create_sampler"],
    "sd_samplers_common.py": ["setup_img2img_steps"],
    "sd_samplers_kdiffusion.py": ["KDiffusionSampler.get_sigmas", "KDiffusionSampler.sample_img2img"],
    "sd_samplers_timesteps.py": ["CompVisSampler.get_timesteps", "CompVisSampler.sample_img2img"],
    "scripts.py": [
        "Script.title",
        "Script.ui",
        "Script.show",
        "Script.process",
        "Script.postprocess_image",
        "Script.postprocess",
        "ScriptRunner.postprocess_image",
        "ScriptRunner.process_before_every_sampling",
        "ScriptRunner.after_extra_networks_activate",
    ],
    "extra_networks.py": ["activate"],
}
"""Functions whose double has the host's parameters. The double keeps two host files in one here and there."""

DOUBLE_OF = {
    "sd_samplers_timesteps.py": "sd_samplers.py",
    "StableDiffusionProcessing.": "StableDiffusionProcessingImg2Img.",
}

OWN_FACTS = {
    "xi = x + noise * sigma_sched[0]": "sd_samplers_kdiffusion.py",
    "xi = self.model_wrap.predictor.noise_scaling(sigma_sched[0], noise, x, max_denoise=False)": "sd_samplers_kdiffusion.py",  # noqa: E501
}
"""The start state: each host says one of these."""

FACTS = {
    "options.py": ["restrict_api=False", "def add_option(self, key, info):", "def info(self, info):"],
    "shared.py": ["hide_dirs = {'visible': not cmd_opts.hide_ui_dir_config}"],
    "script_callbacks.py": ["def on_before_ui(callback", "def on_ui_settings(callback", "def on_app_started(callback"],
    "sd_samplers_kdiffusion.py": [
        "sigma_sched = sigmas[steps - t_enc - 1:]",
        "parameters = inspect.signature(self.func).parameters",
        "xi += noise * opts.img2img_extra_noise",
    ],
    "sd_samplers_timesteps.py": ["alphas_cumprod = shared.sd_model.alphas_cumprod"],
    "sd_samplers_common.py": [
        "step = d['i']",
        "state.sampling_step = step",
        "state.sampling_steps = steps",
        "s_churn = getattr(opts, 's_churn', p.s_churn)",
        "self.rng = p.rng",
    ],
    "sd_samplers_cfg_denoiser.py": ["state.sampling_step, ", "state.sampling_steps, ", "self.step += 1"],
    "progress.py": ["progress += job_no / job_count", "progress += 1 / job_count * sampling_step / sampling_steps"],
    "processing.py": [
        "if getattr(samples_ddim, 'already_decoded', False):",
        "def process_images(p: StableDiffusionProcessing)",
        "res = process_images_inner(p)",
        "save_samples = p.save_samples(",
        "p.batch_index = i",
        "p.height // opt_f, p.width // opt_f)",
        "opt_f = 8",
        "image = images.flatten(img, opts.img2img_background_color)",
        "p.seeds, subseeds=p.subseeds, subseed_strength=p.subseed_strength, seed_resize_from_h=p.seed_resize_from_h, "
        "seed_resize_from_w=p.seed_resize_from_w)",
        "x = self.rng.next()",
        "x *= self.initial_noise_multiplier",
        "if state.job_count == -1:",
        "self.scripts.process_before_every_sampling(",
        "self.nmask = torch.asarray(latmask)",
        '"extra_generation_params": self.extra_generation_params,',
    ],
    "rng.py": ["self.generators = [create_generator(seed + eta_noise_seed_delta) for seed in self.seeds]"],
    "images.py": [
        "if shared.opts.save_images_replace_action != ",
        "fullfn = os.path.join(path, f'{forced_filename}.{extension}')",
        "self.p.batch_index + 1",
        "temp_file_path = f'{filename_without_extension}.tmp'",
        "image.already_saved_as = fullfn",
    ],
    "scripts.py": ["script_index = args[0]", "script = self.selectable_scripts[script_index-1]"],
    "shared_state.py": ["def nextjob(self):", "def assign_current_image(self, image", "textinfo = None"],
    "ui_components.py": ['"elem_id": f"{self.accordion_id}-checkbox",'],
    "ui_tempdir.py": ["already_saved_as = getattr(pil_image, 'already_saved_as', None)"],
    "api/api.py": ["if isinstance(image, str):", "status_code=vars(e).get('status_code', 500)"],
}
"""Lines the extension rests on, as they stand in the host's source (white space and quotes folded)."""

ORDER = ["p.scripts.process(p)", "p.init(", "p.sample(", "decode_latent_batch(p.sd_model", "p.save_samples("]


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Every function of a file by its dotted name."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def folded(text: str) -> str:
    """Text with one kind of quotes and without white space, which formatters change."""
    return "".join(text.replace('"', "'").split())


def source(host: Path, name: str) -> str:
    return folded((host / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in SAME_SIGNATURE.items() for n in names])
def test_the_double_takes_what_the_host_takes(host: Path, file: str, name: str) -> None:
    ours = functions(DOUBLE / DOUBLE_OF.get(file, file))
    own_name = name
    for theirs, double in DOUBLE_OF.items():
        own_name = own_name.replace(theirs, double) if name.startswith(theirs) else own_name
    theirs = functions(host / file)[name]
    assert parameters(ours[own_name]) == parameters(theirs)[: len(parameters(ours[own_name]))]
    required = len(theirs.args.args) - len(theirs.args.defaults)
    assert len(parameters(ours[own_name])) >= required


@pytest.mark.parametrize(("file", "line"), [(f, line) for f, lines in FACTS.items() for line in lines])
def test_the_host_still_says(host: Path, file: str, line: str) -> None:
    assert folded(line) in source(host, file)


def test_the_host_makes_its_start_state_as_we_do(host: Path) -> None:
    assert sum(folded(line) in source(host, file) for line, file in OWN_FACTS.items()) == 1


def test_a_host_that_patches_its_model_patches_it_anew_before_every_sampling(host: Path) -> None:
    text = source(host, "processing.py")
    if "forge_objects" not in text:
        pytest.skip("A1111 patches nothing there")
    told = ("self.sd_model.forge_objects_after_applying_lora.shallow_copy()", "apply_token_merging(self.sd_model, ")
    before, hook = (folded(line) for line in told), folded("self.scripts.process_before_every_sampling(")
    sampled = text[text.index(folded("class StableDiffusionProcessingImg2Img")) :]
    sampled = sampled[sampled.index(folded("def sample(self")) :]
    places = [sampled.index(line) for line in (*before, hook)]
    assert places == sorted(places)
    assert "modified_noise=None" in sampled


def test_the_host_keeps_its_order(host: Path) -> None:
    text = source(host, "processing.py")
    text = text[text.index(folded("def process_images_inner")) :]
    places = [text.index(folded(step)) for step in ORDER]
    assert places == sorted(places)


def test_hooks_swallow_exceptions(host: Path) -> None:
    text = source(host, "scripts.py")
    runner = text[text.index(folded("class ScriptRunner")) :]
    process = runner[runner.index(folded("def process(self, p)")) :][:400]
    assert folded("except Exception:") in process


def test_the_host_names_its_prediction_type_where_we_look(host: Path) -> None:
    """Forge and Neo: a predictor; reForge and Classic: ComfyUI's classes; A1111: the model itself."""
    predictor = host.parent / "backend/modules/k_prediction.py"
    comfy = host.parent / "ldm_patched/modules/model_sampling.py"
    if predictor.exists():
        named = ("self.prediction_type = prediction_type", "prediction_type='const'", "== 'v_prediction'")
        assert [text for text in named if folded(text) not in source(host, predictor)] == []
    elif comfy.exists():
        assert "class V_PREDICTION(EPS):" in comfy.read_text(encoding="utf-8")
    else:
        assert folded("self.sd_model.parameterization") in source(host, "sd_samplers_timesteps.py") or folded(
            "shared.sd_model.parameterization == 'v'"
        ) in source(host, "sd_samplers_kdiffusion.py")


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 16, 16, 16), (1, 16, 3, 8, 8)])
def test_noising_is_forge_s_own_predictors(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    folder = os.environ.get("FORGE_DIR")
    if not folder:
        pytest.skip("FORGE_DIR names no checkout of Forge")
    pytest.importorskip("diffusers", reason="Forge's predictors import diffusers: run this in Forge's environment")
    monkeypatch.syspath_prepend(folder)
    from backend.modules import k_prediction as kp

    x, noise = torch.randn(shape), torch.randn(shape)
    predictors = {
        "eps": kp.Prediction(prediction_type="epsilon"),
        "v": kp.Prediction(prediction_type="v_prediction"),
        "flow": kp.PredictionDiscreteFlow(shift=3.0),
        "flow, Flux": kp.PredictionFlux(),
    }
    for name, predictor in predictors.items():
        for sigma in predictor.sigmas[[0, len(predictor.sigmas) // 2, -1]]:
            theirs = predictor.noise_scaling(sigma, noise.clone(), x.clone())
            plan = levels(torch.stack([sigma, sigma * 0]), 0)
            assert torch.equal(unsample(x, plan, lambda j: noise, "shared", name.split(",")[0])[0], theirs), name
            assert predictor.prediction_type == {"eps": "epsilon", "v": "v_prediction"}.get(name, "const")


@pytest.mark.parametrize("sampler", [f"sample_{s}_ancestral{rf}" for s in ("euler", "dpm_2") for rf in ("", "_RF")])
@pytest.mark.parametrize("cfg", [1.0, 12.0])
def test_replay_through_forge_s_own_flow_steps(monkeypatch: pytest.MonkeyPatch, sampler: str, cfg: float) -> None:
    """Forge's real functions over the embedded flow model: every state again, the source again, bit for bit."""
    folder = os.environ.get("FORGE_DIR")
    if not folder:
        pytest.skip("FORGE_DIR names no checkout of Forge")
    pytest.importorskip("diffusers", reason="Forge's samplers import diffusers: run this in Forge's environment")
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "k_diffusion"]:
        monkeypatch.delitem(sys.modules, name)
    from k_diffusion import sampling as forge

    class Model:
        """A denoiser with the predictor by which Forge's own functions choose their step."""

        inner_model = SimpleNamespace(predictor=None)
        _guided = staticmethod(guided(*(make_model("gaussian-flow", p, 12, 16) for p in ("sea", "night")), cfg))

        def __call__(self, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self._guided(z, sigma)

    plan = levels(torch.linspace(1, 0, 11))
    draw = SeededDraws((5, 6), (3, 12, 16))
    source = make_model("gaussian-flow", "sunset", 12, 16).mean + 0.2 * SeededDraws((8, 9), (3, 12, 16))(0)
    states = torch.stack([z for _, z in walk(source, plan, draw, "independent", "flow")])
    function, seen = getattr(forge, sampler), []
    recording = record(function, Model(), plan.schedule, states, source, iter(()), "flow", disable=True)
    out = replay(
        function, Model(), plan.schedule, recording, disable=True, callback=lambda info: seen.append(info["x"])
    )
    assert torch.equal(torch.stack(seen), recording.states)
    torch.testing.assert_close(recording.states, states.flip(0), rtol=2e-6, atol=2e-6)
    assert torch.equal(out, source)


def test_an_edit_model_s_picture_is_where_we_look(host: Path) -> None:
    """Neo's: encoding keeps it, the next conditions take it, and every call is shown the last conditions' pictures."""
    engines = [host.parent / f"backend/diffusion_engine/{name}.py" for name in ("flux", "flux2", "qwen")]
    if not engines[1].exists():
        pytest.skip("this host has no Flux.2")
    for engine in engines:
        text = source(host, engine)
        assert [
            t
            for t in ("self.ini_latent = None", "self.ini_latent = s", "dynamic_args.ref_latents")
            if folded(t) not in text
        ] == []
    assert folded("class dynamic_args") in source(host, host.parent / "backend/args.py")
    assert folded("ref_latents or dynamic_args.ref_latents") in source(host, host.parent / "backend/nn/flux.py")


def test_the_factor_between_latents_and_pixels_is_the_model_s(host: Path) -> None:
    """Flux.2's autoencoder makes a sixteenth."""
    codec = host.parent / "backend/patcher/vae.py"
    if not codec.exists() or "upscale_ratio = 16" not in codec.read_text(encoding="utf-8"):
        pytest.skip("this host has no such autoencoder")
    assert folded("processing.opt_f = sd_model.forge_objects.vae.upscale_ratio") in source(host, "sd_models.py")

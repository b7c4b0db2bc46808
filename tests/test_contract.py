"""What the double and the extension take for granted of the host, held to a real checkout's source.

Name one with ``A1111_DIR``; without it the module is skipped.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

DOUBLE = Path(__file__).resolve().parent / "host_double/modules"
HOST = os.environ.get("A1111_DIR")
pytestmark = pytest.mark.skipif(not HOST, reason="A1111_DIR names no checkout of the WebUI")

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
    ],
    "rng.py": ["ImageRNG.__init__", "ImageRNG.first", "ImageRNG.next", "randn", "slerp", "create_generator"],
    "sd_samplers.py": ["create_sampler"],
    "sd_samplers_common.py": ["setup_img2img_steps"],
    "sd_samplers_kdiffusion.py": ["KDiffusionSampler.get_sigmas", "KDiffusionSampler.sample_img2img"],
    "sd_samplers_timesteps.py": ["CompVisSampler.get_timesteps", "CompVisSampler.sample_img2img"],
    "scripts.py": ["Script.title", "Script.ui", "Script.show", "Script.process", "Script.postprocess"],
}
"""Functions whose double has the host's parameters. The double keeps two host files in one here and there."""

DOUBLE_OF = {
    "sd_samplers_timesteps.py": "sd_samplers.py",
    "StableDiffusionProcessing.": "StableDiffusionProcessingImg2Img.",
}

FACTS = {
    "sd_samplers_kdiffusion.py": [
        "xi = x + noise * sigma_sched[0]",
        "sigma_sched = sigmas[steps - t_enc - 1:]",
        "parameters = inspect.signature(self.func).parameters",
        "xi += noise * opts.img2img_extra_noise",
    ],
    "sd_samplers_timesteps.py": ["alphas_cumprod = shared.sd_model.alphas_cumprod"],
    "processing.py": [
        "if getattr(samples_ddim, 'already_decoded', False):",
        "save_samples = p.save_samples()",
        "p.rng = rng.ImageRNG((latent_channels, p.height // opt_f, p.width // opt_f), p.seeds, "
        "subseeds=p.subseeds, subseed_strength=p.subseed_strength, seed_resize_from_h=p.seed_resize_from_h, "
        "seed_resize_from_w=p.seed_resize_from_w)",
        "x = self.rng.next()",
        "x *= self.initial_noise_multiplier",
        "if state.job_count == -1:",
        "self.nmask = torch.asarray(latmask)",
        "\"extra_generation_params\": self.extra_generation_params,",
    ],
    "rng.py": ["self.generators = [create_generator(seed + eta_noise_seed_delta) for seed in self.seeds]"],
    "shared_state.py": ["def nextjob(self):", "def assign_current_image(self, image):", "textinfo = None"],
    "ui_components.py": ["class InputAccordion(gr.Checkbox):", "\"elem_id\": f\"{self.accordion_id}-checkbox\","],
    "ui_tempdir.py": ["already_saved_as = getattr(pil_image, 'already_saved_as', None)"],
    "api/api.py": ["if isinstance(image, str):", "status_code=vars(e).get('status_code', 500)"],
}
"""Lines the extension rests on, as they stand in the host's source (white space folded)."""

ORDER = ["p.scripts.process(p)", "p.init(", "p.sample(", "decode_latent_batch(p.sd_model", "p.save_samples()"]


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


def source(name: str) -> str:
    return " ".join((Path(HOST) / "modules" / name).read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in SAME_SIGNATURE.items() for n in names])
def test_the_double_takes_what_the_host_takes(file: str, name: str) -> None:
    ours = functions(DOUBLE / DOUBLE_OF.get(file, file))
    own_name = name
    for theirs, double in DOUBLE_OF.items():
        own_name = own_name.replace(theirs, double) if name.startswith(theirs) else own_name
    host = functions(Path(HOST) / "modules" / file)
    assert parameters(ours[own_name]) == parameters(host[name])[: len(parameters(ours[own_name]))]
    required = len(host[name].args.args) - len(host[name].args.defaults)
    assert len(parameters(ours[own_name])) >= required


@pytest.mark.parametrize(("file", "line"), [(f, line) for f, lines in FACTS.items() for line in lines])
def test_the_host_still_says(file: str, line: str) -> None:
    assert " ".join(line.split()) in source(file)


def test_the_host_keeps_its_order() -> None:
    text = source("processing.py")
    text = text[text.index("def process_images_inner") :]
    places = [text.index(step) for step in ORDER]
    assert places == sorted(places)


def test_hooks_swallow_exceptions() -> None:
    text = source("scripts.py")
    runner = text[text.index("class ScriptRunner") :]
    process = runner[runner.index("def process(self, p)") :][:400]
    assert "except Exception:" in process

"""What ComfyUI hands its sampler's function when it goes on from a latent file: a program run in its own Python.

``python comfyui_hands.py COMFYUI FILE FORM FIRST COUNT SIGMA OUT``: ComfyUI's own nodes *LoadLatent* and
*SamplerCustom* with its noise disabled, on a model of a kind (sd15, sd15-v, sdxl, sd3, flux) without
its network, which nothing here asks. The state that the sampler's function gets goes to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def model_of(form: str) -> Any:
    """ComfyUI's own model and patcher, its network left out."""
    import torch
    from comfy import model_base, supported_models
    from comfy.model_patcher import ModelPatcher

    kinds = {"sd15": "SD15", "sd15-v": "SD15", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux"}
    unknown = {"disable_unet_model_creation": True, "in_channels": 4, "out_channels": 4}  # as many: no inpainting
    config = getattr(supported_models, kinds[form])(unknown)
    config.set_inference_dtype(torch.float32, None)
    if form == "sd15-v":
        model = model_base.BaseModel(config, model_base.ModelType.V_PREDICTION)
    else:
        model = config.get_model({}, "", torch.device("cpu"))
    model.diffusion_model = torch.nn.Linear(1, 1)
    model.diffusion_model.dtype = torch.float32
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def main(comfyui: str, file: str, form: str, first: str, count: str, sigma: str, out: str) -> None:
    """Loads one level's images, samples from it, and writes what the sampler's function was handed."""
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, comfyui)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfyui_version
    import folder_paths
    import nodes
    import torch
    from comfy.samplers import KSAMPLER
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from safetensors.torch import save_file

    folder_paths.set_input_directory(str(Path(file).parent))
    (latent,) = nodes.LoadLatent().load(Path(file).name)
    latent["samples"] = latent["samples"][int(first) : int(first) + int(count)]  # node LatentFromBatch
    handed: list[torch.Tensor] = []

    def sampler(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **_: Any) -> torch.Tensor:
        handed.append(x.clone())
        return x

    context = torch.zeros(1, 77, 768)
    conds = [[context, {"pooled_output": torch.zeros(1, 1280)}]]
    way = torch.tensor([float(sigma), 0.0])
    SamplerCustom().sample(model_of(form), False, 0, 1.0, conds, conds, KSAMPLER(sampler), way, latent)
    save_file({"handed": handed[0]}, out, {"version": comfyui_version.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A page with the accordion, the host's controls that it reads, and Generate; in a real Chromium.

The page is gradio's, the request runs in the doubled host: what stands between is the extension's own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/webui"))

from doubled import doubled_host  # noqa: E402

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium under Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium, or name one in CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page's address, and the requests that Generate made."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patched, doubled_host(folder, patched) as host:
        app, made = page_app(host, folder)
        settings = {"prevent_thread_lock": True, "server_name": "127.0.0.1", "quiet": True, "head": head()}
        _, url, _ = app.launch(allowed_paths=[str(folder)], **settings)
        yield SimpleNamespace(url=url, made=made, host=host)
        app.close()


def head() -> str:
    script = (ROOT / "javascript/batch_unsampler.js").read_text(encoding="utf-8")
    style = (ROOT / "style.css").read_text(encoding="utf-8")
    return f"<style>{style}</style><script>{script}</script>"


def page_app(host: SimpleNamespace, folder: Path) -> tuple[Any, list[Any]]:
    """A gradio app with img2img's controls by the host's ids, and what it has generated."""
    import gradio as gr

    made: list[Any] = []
    with gr.Blocks() as app:
        sampler = gr.Dropdown(["Euler", "Euler a", "DPM++ 2M", "DDIM"], value="Euler", elem_id="img2img_sampling")
        numbers = {
            "steps": gr.Slider(1, 150, 8, step=1, label="Sampling steps", elem_id="img2img_steps"),
            "denoising_strength": gr.Slider(0, 1, 0.6, label="Strength", elem_id="img2img_denoising_strength"),
            "seed": gr.Number(5, label="Seed", elem_id="img2img_seed", precision=0),
            "width": gr.Slider(64, 2048, 64, step=8, label="Width", elem_id="img2img_width"),
            "height": gr.Slider(64, 2048, 64, step=8, label="Height", elem_id="img2img_height"),
        }
        controls = host.script.ui(True)
        generate = gr.Button("Generate", elem_id="img2img_generate")
        with gr.Group(elem_id="img2img_gallery_container"):
            gallery = gr.Gallery(label="Output", elem_id="img2img_gallery", columns=4)
        info = gr.Textbox(elem_id="generation_info_img2img", label="info", elem_classes=["batch-unsampler-hidden"])

        def work(sampler_name: str, *values: Any) -> tuple[list[str], str]:
            asked = dict(zip(numbers, values))
            p = host.make((True, *values[len(numbers) + 1 :]), sampler_name=sampler_name, **asked)
            processed = host.processing.process_images(p)
            made.append((p, processed))
            files = []
            for number, image in enumerate(processed.images):
                file = getattr(image, "already_saved_as", None) or str(folder / f"shown-{len(made)}-{number}.png")
                if not Path(file).exists():
                    image.save(file)
                files.append(file)
            told = {"all_seeds": p.all_seeds, "seed": p.seed, "steps": p.steps, "batch_size": p.batch_size}
            told |= {"sampler_name": p.sampler_name, "extra_generation_params": processed.extra_generation_params}
            return files, json.dumps(told)

        generate.click(work, inputs=[sampler, *numbers.values(), *controls], outputs=[gallery, info])
    return app, made

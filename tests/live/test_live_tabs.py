"""Two tabs of a running WebUI's page and clients of its API, all at once: each gets its own, as when it asks alone.

Run with ``-m live`` where Playwright and a Chromium are; see test_page.py.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_live import CAT, URL, frames_of, img2img
from test_page import begin_again, paste, put, quoted, results, shown_in_gallery, sync_api, upload

from lib_unsampler.settings import parse, to_infotext

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
TABS: list[tuple[int, dict[str, Any]]] = [
    (11, {"output": ["animation", "frames"], "noise": "path", "format": "webp"}),
    (12, {"mode": "replay", "output": ["frames", "init"], "captions": True}),
]
ASKED: list[dict[str, Any]] = [{"output": ["frames", "init"], "noise": "independent"}, {"output": ["animation"]}]


@pytest.fixture(scope="module")
def tabs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Each with a picture under a white mask whose content is seeded noise, so that it is repeatable."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.open(CAT).convert("RGB").resize((128, 128)).save(folder / "cat.png")
    Image.new("RGB", (128, 128), "white").save(folder / "mask.png")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        pages = [browser.new_context(viewport={"width": 1400, "height": 1300}).new_page() for _ in TABS]
        for page, (seed, settings) in zip(pages, TABS):
            page.goto(URL, timeout=120000)
            begin_again(page)
            prepare(page, folder, seed, settings)
        yield pages
        browser.close()


def prepare(page: Any, folder: Path, seed: int, settings: dict[str, Any]) -> None:
    lines = ", ".join(f"{key}: {quoted(value)}" for key, value in to_infotext(parse(settings, "host"), "host").items())
    mask = "Denoising strength: 0.7, Mask blur: 0, Masked content: latent noise, Inpaint area: Whole picture"
    sampling = "Steps: 12, Sampler: Euler a, Schedule type: Automatic, CFG scale: 2, Seed: 5, Size: 128x128"
    paste(page, f"a cat\n{sampling}, {mask}, Unsampler version: 0, {lines}")
    upload(page, folder / "cat.png", folder / "mask.png")
    put(page, "#img2img_seed", seed)
    page.locator("#img2img_inpainting_fill label", has_text="latent noise").click()


def first_shown(page: Any) -> str:
    return next(iter(shown_in_gallery(page)), "")


def result(page: Any, before: str) -> list[str]:
    """What a tab shows once it shows something new: its pictures' frames, in short."""
    shown = []
    for source in results(page, before):
        read = Image.open(io.BytesIO(page.request.get(source).body()))
        shown.append(hashlib.sha256(b"".join(frames_of(read))).hexdigest())
    return shown


def generated(page: Any) -> list[str]:
    before = first_shown(page)
    page.click("#img2img_generate")
    return result(page, before)


def answers() -> list[list[str]]:
    return [img2img(settings, steps=8)["images"] for settings in ASKED]


def test_two_tabs_and_the_api_each_get_their_own(tabs: list[Any]) -> None:
    alone, asked_alone = [generated(page) for page in tabs], answers()
    assert [generated(page) for page in tabs] == alone and answers() == asked_alone, "not repeatable alone"
    assert [len(shown) for shown in alone] == [14, 11], "an animation and 13 frames; 10 frames and img2img's own"
    asked: list[list[list[str]]] = []
    ended = threading.Event()

    def ask_on() -> None:
        while not ended.is_set():
            asked.append(answers())

    client = threading.Thread(target=ask_on)
    client.start()
    try:
        for _ in range(2):
            before = [first_shown(page) for page in tabs]
            for page in tabs:
                page.click("#img2img_generate")
            assert [result(page, shown) for page, shown in zip(tabs, before)] == alone
    finally:
        ended.set()
        client.join()
    assert len(asked) > 1 and all(images == asked_alone for images in asked)

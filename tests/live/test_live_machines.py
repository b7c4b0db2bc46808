"""Two running A1111 on which stable-diffusion-webui-distributed shares requests out: ``WEBUI_URL`` is the master,
``WORKER_URL`` its only worker, on the same disk. See test_live.py.

Its ``distributed-config.json`` should name both with the same speed (``avg_ipm``) and a ``job_timeout`` of 1000, so
that each gets half of a batch.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import test_live
from named import named_files
from test_live import URL, apart, img2img, kinds, opened

WORKER = os.environ.get("WORKER_URL", "")
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not (URL and WORKER), reason="WEBUI_URL and WORKER_URL name no two running WebUIs"),
]
EULER = {"sampler_name": "Euler", "cfg_scale": 1, "steps": 20, "denoising_strength": 1.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "init": ({"output": ["init"], "noise": "path"}, {}),
    "guide": ({"output": ["guide"]}, {}),
    "invert": ({"output": ["init"], "mode": "invert"}, EULER),
    "replay": ({"output": ["init"], "mode": "replay", "cfg": 3}, {}),
    "sweep": ({"output": ["strength sweep"], "step_increment": 2}, {}),
    "frames": ({"output": ["frames", "animation"]}, {}),
    "beside": ({"output": ["init", "frames", "animation"], "film": "both"}, {}),
    "latents": ({"output": ["latents"]}, {}),
}


@pytest.mark.parametrize("batch", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_image_is_its_own_and_what_belongs_to_it_is_there(
    case: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, fields = CASES[case]
    several = img2img(settings, batch_size=batch, **fields)
    with monkeypatch.context() as at_the_worker:
        at_the_worker.setattr(test_live, "URL", WORKER)
        one = img2img({**settings, "reply": "own only"}, batch_size=batch, **fields)
    pictures = [[opened(i).convert("RGB").tobytes() for i in reply["images"][:batch]] for reply in (several, one)]
    assert max(apart(mine, alone) for mine, alone in zip(*pictures)) <= 1 and len(set(pictures[0])) == batch
    assert kinds(several)[:batch] == ["own"] * batch and len(kinds(several)) == len(several["images"])
    texts = several["infotexts"][:batch]
    assert [re.search(r"Seed: (\d+)", text).group(1) for text in texts] == [str(5 + i) for i in range(batch)]
    assert ["Worker Label" in text for text in texts] == [i >= batch // 2 for i in range(batch)]
    for text in texts[batch // 2 :]:
        files = named_files(text)
        assert bool(files) == bool({"frames", "animation", "strength sweep", "latents"} & set(settings["output"]))
        assert all(file.exists() for file in files)

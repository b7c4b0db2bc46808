"""The files that the parameters of a picture name."""

from __future__ import annotations

import json
import re
from pathlib import Path


def named_files(text: str) -> list[Path]:
    """Every file that an own picture's parameters name; of a range the first and the last."""
    found = re.search(r'Unsampler files: ("(?:[^"\\]|\\.)*")', text)
    files: list[Path] = []
    for part in json.loads(found.group(1)).split("; ") if found else []:
        names, folder = part.rsplit(" in ", 1)
        files += [Path(folder) / name for name in re.findall(r"[\w.-]+\.(?:png|gif|safetensors)", names)]
    return files

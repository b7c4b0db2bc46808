"""Levels kept on a disk that fills up: the error names the file, and leaving hides no other error."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import files_up_to

from lib_unsampler.core.kept import Kept
from lib_unsampler.files import spool

READS: dict[str, Callable[[Kept], object]] = {"stack": Kept.stack, "tensors": lambda kept: list(kept.tensors())}


@pytest.mark.parametrize("side", [8, 64], ids=["in the buffer", "beyond it"])
@pytest.mark.parametrize("read", READS)
def test_a_full_disk_is_told_by_the_file_s_name(tmp_path: Path, side: int, read: str) -> None:
    path = tmp_path / "levels.safetensors"
    with pytest.raises(OSError, match=re.escape(str(path))) as caught, files_up_to(100), Kept(path) as kept:
        for _ in range(3):
            kept.add(torch.ones(1, 4, side, side))
        READS[read](kept)
    assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


def test_what_nobody_reads_need_not_fit(tmp_path: Path) -> None:
    with files_up_to(100), Kept(tmp_path / "levels.safetensors") as kept:
        kept.add(torch.ones(1, 4, 8, 8))
    with pytest.raises(KeyError, match="another"), files_up_to(100), spool(tmp_path / "x") as file:
        file.write(bytes(1000))
        raise KeyError("another error")

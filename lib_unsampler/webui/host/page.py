"""What belongs to the WebUI rather than to a request: preferences, folders, accounts, the X/Y/Z plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from modules import scripts, shared

from ...settings import TITLE, Preferences, parse_preferences


def xyz_plot() -> Any:
    """The module of the X/Y/Z plot, or None where there is none."""
    modules = (data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py")
    return next(modules, None)


PREFERENCE = "batch_unsampler_"
"""Before the names of the extension's preferences among the WebUI's own."""


def add_preferences(components: Mapping[str, tuple[Any, dict[str, Any]]]) -> None:
    """Puts the extension's section into the Settings tab.

    Arguments:
        components: Each preference's gradio component and its arguments, by the preference's name.
    """
    for f in fields(Preferences):
        component, settings = components[f.name]
        folder = f.name.endswith("folder")  # no API client chooses where files go, nor a page that hides folders
        shown = {**settings, **(shared.hide_dirs if folder else {})}
        option = shared.OptionInfo(
            *(f.default, f.metadata["label"], component, shown), section=("batch_unsampler", TITLE), restrict_api=folder
        )
        shared.opts.add_option(PREFERENCE + f.name, option.info(f.metadata["help"]))


def preferences() -> Preferences:
    """What the Settings tab says now.

    Raises:
        SettingsError: naming each preference that is out of its bounds.
    """
    keys = {f.name: PREFERENCE + f.name for f in fields(Preferences)}
    return parse_preferences({name: getattr(shared.opts, k) for name, k in keys.items() if hasattr(shared.opts, k)})


def field_defaults() -> dict[str, Any]:
    """The fields whose default is a preference; one out of its bounds is left for the request to refuse."""
    names = ("duration", "format")
    values = {name: getattr(shared.opts, PREFERENCE + name, getattr(Preferences, name)) for name in names}
    for name, value in values.items():
        if value not in _begun_with.setdefault(name, []):
            _begun_with[name].append(value)
    return values


_begun_with: dict[str, list[Any]] = {}


def earlier_defaults() -> Mapping[str, Sequence[Any]]:
    """What such fields have begun with since the start: the API keeps the defaults of its first page."""
    return _begun_with


def output_folder() -> Path:
    """Where img2img's pictures go, and the latents files with them."""
    return Path(shared.opts.outdir_samples or shared.opts.outdir_img2img_samples)


def animation_folder() -> Path:
    """Where animations go."""
    return Path(getattr(shared.opts, PREFERENCE + "animation_folder", "") or output_folder())


def accounts() -> dict[str, str]:
    """The API's passwords by user name; none where it is open."""
    given = getattr(shared.cmd_opts, "api_auth", None)
    return dict(account.split(":", 1) for account in given.split(",")) if given else {}


def serves_api() -> bool:
    """Whether this WebUI was started with its API."""
    return bool(getattr(shared.cmd_opts, "api", False) or getattr(shared.cmd_opts, "nowebui", False))

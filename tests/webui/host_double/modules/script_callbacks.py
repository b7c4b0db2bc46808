"""The host keeps what scripts register and calls it later."""

registered = {"before_ui": [], "ui_settings": [], "app_started": [], "cfg_denoiser": []}


def on_before_ui(callback):
    registered["before_ui"].append(callback)


def on_ui_settings(callback):
    registered["ui_settings"].append(callback)


def on_app_started(callback):
    registered["app_started"].append(callback)


def on_cfg_denoiser(callback):
    registered["cfg_denoiser"].append(callback)


def cfg_denoiser_callback(params):
    for callback in registered["cfg_denoiser"]:
        callback(params)

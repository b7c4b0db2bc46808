"""The host keeps what scripts register and calls it later."""

registered = {"before_ui": [], "ui_settings": [], "app_started": []}


def on_before_ui(callback):
    registered["before_ui"].append(callback)


def on_ui_settings(callback):
    registered["ui_settings"].append(callback)


def on_app_started(callback):
    registered["app_started"].append(callback)

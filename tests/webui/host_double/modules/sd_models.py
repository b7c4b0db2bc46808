from types import SimpleNamespace


class SdModelData:
    def __init__(self):
        self.sd_model = None
        self.forge_loading_parameters = {}


model_data = SdModelData()


def checkpoint(name):
    return SimpleNamespace(name=name, name_for_extra=name, filename=f"/models/{name}")

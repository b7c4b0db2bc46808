AlwaysVisible = object()


class Script:
    args_from = args_to = None

    def title(self):
        raise NotImplementedError

    def ui(self, is_img2img):
        pass

    def show(self, is_img2img):
        return True

    def process(self, p, *args):
        pass

    def postprocess(self, p, processed, *args):
        pass


class ScriptRunner:
    """One always-on script; what its hooks raise is swallowed, as the host does."""

    def __init__(self, script):
        self.script = script
        self.swallowed = []

    def call(self, name, p, *more):
        try:
            getattr(self.script, name)(p, *more, *p.script_args)
        except Exception as error:
            self.swallowed.append(error)

    def process(self, p):
        self.call("process", p)

    def postprocess(self, p, processed):
        self.call("postprocess", p, processed)

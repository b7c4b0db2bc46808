AlwaysVisible = object()
scripts_data = []


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

    def postprocess_image_after_composite(self, p, pp, *args):
        pass

    def postprocess_image(self, p, pp, *args):
        pass

    def postprocess(self, p, processed, *args):
        pass


class PostprocessBatchListArgs:
    def __init__(self, images):
        self.images = images


class PostprocessImageArgs:
    def __init__(self, image):
        self.image = image


class ScriptRunner:
    """One always-on script, and others without arguments; what their hooks raise is swallowed, as the host does.

    The first script argument is the number of the selected script, counted from 1, or 0.
    """

    def __init__(self, script):
        self.script = script
        self.script.args_from = 1
        self.selectable_scripts = []
        self.others = []
        self.swallowed = []

    @property
    def alwayson_scripts(self):
        return [self.script, *self.others]

    def run(self, p, *args):
        script_index = args[0]
        if script_index == 0 or script_index is None:
            return None
        return self.selectable_scripts[script_index - 1].run(p)

    def call(self, name, p, *more, **kwargs):
        for script in [s for s in [self.script, *self.others] if hasattr(s, name)]:
            args = p.script_args[self.script.args_from :] if script is self.script else ()
            try:
                getattr(script, name)(p, *more, *args, **kwargs)
            except Exception as error:
                self.swallowed.append(error)

    def setup_scrips(self, p):
        self.call("setup", p)

    def before_process(self, p):
        self.call("before_process", p)

    def postprocess_batch_list(self, p, pp, batch_number):
        for script in [s for s in self.others if hasattr(s, "postprocess_batch_list")]:
            script.postprocess_batch_list(p, pp, batch_number=batch_number)

    def process(self, p):
        self.call("process", p)

    def after_extra_networks_activate(self, p, **kwargs):
        self.call("after_extra_networks_activate", p, **kwargs)

    def process_before_every_sampling(self, p, **kwargs):
        self.call("process_before_every_sampling", p, **kwargs)

    def postprocess_image(self, p, pp):
        self.call("postprocess_image", p, pp)

    def postprocess(self, p, processed):
        self.call("postprocess", p, processed)

    def postprocess_image_after_composite(self, p, pp):
        self.call("postprocess_image_after_composite", p, pp)

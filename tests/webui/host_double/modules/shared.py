from types import SimpleNamespace


class State:
    def __init__(self):
        self.interrupted = self.skipped = self.stopping_generation = False
        self.job_count, self.job_no = -1, 0
        self.sampling_step = self.sampling_steps = 0
        self.textinfo = None
        self.previews = []
        self.current_latent = None
        self.current_image_sampling_step = 0

    def nextjob(self):
        self.job_no += 1
        self.sampling_step = self.current_image_sampling_step = 0

    def set_current_image(self):
        if self.current_latent is not None and self.sampling_step > self.current_image_sampling_step:
            self.previews.append(self.current_latent)
            self.current_image_sampling_step = self.sampling_step

    def assign_current_image(self, image):
        self.previews.append(image)


state = State()


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, section=None, restrict_api=False):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.section, self.restrict_api, self.comment_after = section, restrict_api, ""

    def info(self, info):
        self.comment_after += info
        return self


class Options(SimpleNamespace):
    @property
    def data(self):
        return vars(self)

    def add_option(self, key, info):
        self.data_labels[key] = info
        if not hasattr(self, key):
            setattr(self, key, info.default)


cmd_opts = SimpleNamespace(api=True, api_auth=None)
hide_dirs = {"visible": True}
opts = Options(
    data_labels={},
    outdir_samples="",
    outdir_img2img_samples="outputs",
    randn_source="CPU",
    eta_noise_seed_delta=0,
    img2img_fix_steps=False,
    img2img_background_color="#ffffff",
    img2img_extra_noise=0.0,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=0.0,
    s_noise=1.0,
    samples_save=True,
    samples_format="png",
    save_txt=False,
    save_incomplete_images=False,
    live_previews_enable=True,
    overlay_inpaint=True,
    save_images_replace_action="Replace",
    temp_dir="",
    return_grid=False,
    grid_only_if_multiple=True,
)
sd_model = None

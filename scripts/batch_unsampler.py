"""Batch Unsampler in the WebUI: the wiring of its hooks, and nothing else."""

from modules import script_callbacks, scripts

try:
    from modules import sd_samplers_kdiffusion  # noqa: F401
    from modules.ui_components import InputAccordion

    from lib_unsampler import settings
    from lib_unsampler.webui import axes, extension, machines, preview, routes, ui
    from lib_unsampler.webui.host import page
except ImportError as error:
    print(f"[Batch Unsampler] not active: this WebUI lacks k-diffusion samplers or its hooks ({error})")
else:

    class BatchUnsampler(scripts.Script):
        """The always-on script of the img2img tab."""

        def title(self):
            return settings.TITLE

        def show(self, is_img2img):
            return scripts.AlwaysVisible if is_img2img else False

        def ui(self, is_img2img):
            controls = ui.build(
                *(InputAccordion, self.title(), page.field_defaults(), page.output_folder, preview.answer)
            )
            self.infotext_fields = ui.paste_fields(controls)
            return controls

        @property
        def api_info(self):
            """What the host publishes of the arguments; it sets this itself."""
            return self._api_info

        @api_info.setter
        def api_info(self, info):
            self._api_info = ui.documented(info)

        _api_info = None

        def setup(self, p, *args):
            machines.share(p, args)

        def process(self, p, *args):
            extension.attach(p, args)

        def postprocess_image_after_composite(self, p, pp, *args):
            extension.take(p, pp.image)

        def postprocess(self, p, processed, *args):
            extension.finish(p, processed)

    script_callbacks.on_before_ui(axes.register)
    script_callbacks.on_ui_settings(lambda: page.add_preferences(ui.preference_components()))
    if page.serves_api():
        script_callbacks.on_app_started(
            lambda _, app: routes.add(app, page.output_folder, page.accounts(), page.animation_folder)
        )

"""Batch Unsampler in the WebUI: the wiring of its hooks, and nothing else."""

from modules import scripts

try:
    from modules import sd_samplers_kdiffusion  # noqa: F401
    from modules.ui_components import InputAccordion

    from lib_unsampler import extension, ui
except ImportError as error:
    print(f"[Batch Unsampler] not active: this WebUI lacks k-diffusion samplers or its hooks ({error})")
else:

    class BatchUnsampler(scripts.Script):
        """The always-on script of the img2img tab."""

        def title(self):
            return "Batch Unsampler"

        def show(self, is_img2img):
            return scripts.AlwaysVisible if is_img2img else False

        def ui(self, is_img2img):
            controls = ui.build(InputAccordion, self.title())
            self.infotext_fields = ui.paste_fields(controls)
            return controls

        def process(self, p, *args):
            extension.attach(p, args)

        def postprocess(self, p, processed, *args):
            extension.finish(p, processed)

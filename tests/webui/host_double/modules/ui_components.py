import gradio as gr


class InputAccordion:
    """The host's tick-box accordion: entered like a block, read like a checkbox."""

    def __new__(cls, value, **kwargs):
        box = gr.Checkbox(value, visible=False, elem_id=f"{kwargs['elem_id']}-checkbox", label=kwargs["label"])
        accordion = gr.Accordion(open=value, **kwargs)

        class Entered(type(box)):
            def __enter__(self):
                accordion.__enter__()
                return self

            def __exit__(self, *error):
                return accordion.__exit__(*error)

        box.__class__ = Entered
        return box

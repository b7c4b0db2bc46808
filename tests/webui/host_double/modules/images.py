import os

from PIL import Image, PngImagePlugin

from modules import shared


def save_image(
    image,
    path,
    basename,
    seed=None,
    prompt=None,
    extension="png",
    info=None,
    short_filename=False,
    no_prompt=False,
    grid=False,
    pnginfo_section_name="parameters",
    p=None,
    existing_info=None,
    forced_filename=None,
    suffix="",
    save_to_dirs=None,
):
    os.makedirs(path, exist_ok=True)
    number = len(os.listdir(path))
    name = os.path.join(path, f"{number:05d}-{seed}{suffix}.{extension}")
    text = PngImagePlugin.PngInfo()
    if info is not None:
        text.add_text(pnginfo_section_name, info)
    part = os.path.splitext(name)[0] + ".tmp"
    image.save(part, format=Image.registered_extensions()[f".{extension}"], pnginfo=text)
    os.replace(part, name)
    image.already_saved_as = name
    if not shared.opts.save_txt or info is None:
        return name, None
    text_name = os.path.splitext(name)[0] + ".txt"
    with open(text_name, "w", encoding="utf8") as file:
        file.write(f"{info}\n")
    return name, text_name


def flatten(img, bgcolor):
    if img.mode == "RGBA":
        background = Image.new("RGBA", img.size, bgcolor)
        background.paste(img, mask=img)
        img = background
    return img.convert("RGB")


def resize_image(resize_mode, im, width, height):
    return im.resize((width, height))

"""The parts of the page: the form of each tab, and the panel in which pictures appear."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr
from gradio_client.utils import is_http_url_like

from .limits import MAX_LETTERS, Range
from .look import NO_SETTINGS, status


class Form(NamedTuple):
    """A tab's controls, by the names that settings have in a picture's file, and its buttons."""

    controls: dict[str, gr.components.Component]
    random_seed: gr.Checkbox
    start: gr.Image | None
    generate: gr.Button
    cancel: gr.Button


class Result(NamedTuple):
    """Where a picture appears, with what it says of itself."""

    status: gr.HTML
    picture: gr.Image
    settings: gr.HTML
    download: gr.DownloadButton


def unchecked(control: gr.components.Component) -> gr.components.Component:
    """The control, handing over whatever was sent: `limits.check_settings` says what is wrong with which."""
    control.preprocess = lambda value: value
    return control


def make_upload(label: str) -> gr.Image:
    """Takes a file and hands over its path: `limits.read_upload` reads it."""
    upload = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=230, buttons=[])
    keep = upload.async_move_resource_to_block_cache

    async def keep_upload(path: str | None) -> str | None:
        # A caller of the API could name an address, which gradio would fetch.
        if path is not None and is_http_url_like(path):
            raise gr.Error(
                "The picture to start from must be uploaded, not named by its address", print_exception=False
            )
        return await keep(path)

    # On the object: for a class of its own gradio would write a stub beside this file.
    upload.async_move_resource_to_block_cache = keep_upload
    upload.preprocess = lambda file: None if file is None else file.path
    return upload


def make_form(values: Mapping[str, Any], ranges: Mapping[str, Range], from_image: bool) -> Form:
    def slider(name: str, label: str) -> gr.Slider:
        low, high, step = ranges[name]
        return unchecked(gr.Slider(low, high, values[name], step=step, label=label, min_width=130))

    start = make_upload("Picture to start from") if from_image else None
    controls = {
        "prompt": gr.Textbox(values["prompt"], label="Prompt", lines=2, max_length=MAX_LETTERS),
        "negative_prompt": gr.Textbox(
            values["negative_prompt"],
            label="Negative prompt",
            placeholder="what to steer away from",
            max_length=MAX_LETTERS,
        ),
    }
    if from_image:
        controls["strength"] = slider("strength", "Strength")
    with gr.Row():
        controls |= {"width": slider("width", "Width"), "height": slider("height", "Height")}
    with gr.Row():
        controls |= {"steps": slider("steps", "Steps"), "guidance_scale": slider("guidance_scale", "Guidance")}
    with gr.Row(elem_classes="seed"):
        controls["seed"] = unchecked(gr.Number(values["seed"], label="Seed", min_width=130))
        random_seed = gr.Checkbox(True, label="Random seed", min_width=130)
    with gr.Row(elem_classes="buttons"):
        generate = gr.Button("Generate", variant="primary", min_width=130)
        cancel = gr.Button("Cancel", min_width=130)
    return Form(controls, random_seed, start, generate, cancel)


def make_result() -> Result:
    return Result(
        status=gr.HTML(status("Ready"), elem_classes="status"),
        picture=gr.Image(
            label="Picture",
            type="filepath",
            interactive=False,
            buttons=["fullscreen"],
            height="min(27rem, 92vw)",
            elem_classes="picture",
        ),
        settings=gr.HTML(NO_SETTINGS, elem_classes="settings"),
        download=gr.DownloadButton("Download PNG with its settings", interactive=False),
    )


def make_gallery(label: str, name: str, pictures: list[tuple[str, str]]) -> gr.Gallery:
    """Pictures with captions, to choose from."""
    return gr.Gallery(
        pictures,
        label=label,
        visible=bool(pictures),
        height="auto",
        allow_preview=False,
        buttons=[],
        elem_classes=["pictures", name],
    )

"""The page, put together, and what happens on it."""

import html
import io
import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache, save_file_to_cache
from PIL import Image

from ..model_info import BUNDLED_NAME
from ..png_settings import picture_digest, read_settings, settings_chunks
from .examples import Example
from .layout import Form, make_form, make_gallery, make_result
from .limits import MAX_UPLOAD_BYTES, check_settings, ranges_of, read_upload
from .look import CSS, THEME, header, settings_list, status
from .painter import Painter, Step

MAX_WAITING = 100  # pictures that all visitors together may wait for
KEPT_VISITORS = 2 * MAX_WAITING  # gradio keeps 0.2 MB for each, by default of 10,000
KEPT_PICTURES = 12  # of each visitor
CACHE_SECONDS = 24 * 60 * 60
BUNDLED_NOTE = (
    "The demonstration model of the package: it draws coloured circles, squares and triangles, nothing else."
)
UNSEEN = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


class Page:
    """
    The demo's page.

    Args:
        painter (`Painter`): Has the model.
        examples (`list[Example]`): What the gallery shows. The forms start with the settings of the first one, since
            they suit the model, or without examples with those of the pipeline.
    """

    def __init__(self, painter: Painter, examples: list[Example]):
        self.painter, self.examples = painter, examples
        self.ranges = ranges_of(painter.text_to_image)
        suited = examples[0].settings if examples else {}
        starting = painter.defaults | {name: suited[name] for name in painter.defaults if name in suited}

        with gr.Blocks(title="LocalDiT", analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as self.app:
            gr.HTML(self.header(), elem_classes="header")
            with gr.Row(equal_height=False):
                with gr.Column(min_width=320), gr.Tabs() as self.tabs:
                    with gr.Tab("Text to image", id="text"):
                        self.text_form = make_form(starting, self.ranges, from_image=False)
                    with gr.Tab("Image to image", id="image"):
                        self.image_form = make_form(starting, self.ranges, from_image=True)
                with gr.Column(min_width=320):
                    self.result = make_result()
            self.paths = gr.State([])  # of this visitor's pictures
            self.earlier = make_gallery("Earlier pictures", "earlier", [])
            pictures = [(str(path), settings["prompt"]) for path, settings, _ in examples]
            self.gallery = make_gallery("Examples: choose one to fill in the form", "examples", pictures)
            self.connect()
        self.app.queue(max_size=MAX_WAITING)

    def header(self) -> str:
        model, transformer = self.painter.made_by["model"], self.painter.text_to_image.transformer
        name = Path(model).name if Path(model).is_absolute() else model  # visitors need not know where it lies
        facts = f"{name}, {transformer.num_parameters() / 1e6:,.1f} M parameters, on {self.painter.made_by['device']}"
        return header("LocalDiT", facts, BUNDLED_NOTE if model == BUNDLED_NAME else "")

    def connect(self) -> None:
        """Says what follows from what a visitor does."""
        result, forms = self.result, (self.text_form, self.image_form)
        started = [self.on_generate(form) for form in forms]
        for form, picture in zip(forms, started):
            form.cancel.click(None, cancels=started)
            # After an error, and once the step at which a visitor cancels has come to its end.
            picture.failure(lambda: status("No picture was made"), None, result.status, **UNSEEN)

        of_picture = [result.picture, result.settings, result.download]
        self.earlier.select(self.show_earlier, self.paths, of_picture, **UNSEEN)

        start, sizes = self.image_form.start, [self.image_form.controls[name] for name in ("width", "height")]
        start.upload(self.fitting_sizes, start, sizes, **UNSEEN)

        filled_in = [self.tabs, start]
        for form in forms:
            filled_in += [form.random_seed, *form.controls.values()]
        self.gallery.select(self.fill_in, None, filled_in, **UNSEEN)

    def on_generate(self, form: Form):
        def generate(**values):
            yield from self.generate(form, **values)

        start = {} if form.start is None else {"start": form.start}
        return gr.on(
            [form.generate.click, form.controls["prompt"].submit],
            generate,
            inputs_kwargs=start | form.controls | {"random_seed": form.random_seed, "paths": self.paths},
            outputs=[form.controls["seed"], *self.result, self.earlier, self.paths],
            api_name="image_to_image" if start else "text_to_image",
            concurrency_id="painter",  # of both forms: the painter makes one picture at a time
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=self.result.status,
            scroll_to_output=True,
        )

    # What the events do

    def generate(
        self, form: Form, random_seed: bool, paths: list[str], start: str | None = None, **settings: Any
    ) -> Iterator[dict]:
        """Shows each step, then the picture. gradio closes the iterator when the visitor cancels or leaves."""
        result = self.result
        if random_seed:
            settings["seed"] = secrets.randbelow(int(self.ranges["seed"].high) + 1)
        try:
            settings = check_settings(settings, self.ranges)
            image = None if form.start is None else read_upload(start)
            yield {result.status: status("Starting")}
            with closing(self.painter.paint(settings, image)) as progress:
                for made in progress:
                    if isinstance(made, Step):
                        yield {result.status: status(f"Step {made.done} of {made.total}", *made)}
        except (ValueError, torch.OutOfMemoryError) as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            message = "Out of memory: choose a smaller size" if out_of_memory else str(error)
            raise gr.Error(html.escape(message), print_exception=False) from error

        if image is not None:
            settings |= {"image": Path(start).name, "image_sha256": picture_digest(image)}
        path = self.save(made, settings)
        paths = [path, *paths][:KEPT_PICTURES]
        yield {
            form.controls["seed"]: settings["seed"],
            result.status: status("Done", 1, 1),
            **dict(zip((result.picture, result.settings, result.download), self.shown(path))),
            self.earlier: gr.Gallery(
                [(path, read_settings(path)["prompt"]) for path in paths], visible=len(paths) > 1
            ),
            self.paths: paths,
        }

    def save(self, image: Image.Image, settings: Mapping[str, Any]) -> str:
        file = io.BytesIO()
        image.save(file, "PNG", pnginfo=settings_chunks(self.painter.made_by | settings))
        return save_bytes_to_cache(
            file.getvalue(), f"localdit-{settings['seed']}.png", cache_dir=self.result.picture.GRADIO_CACHE
        )

    def shown(self, path: str) -> tuple:
        """A picture, its settings and its download; the first two are read from the file, as others will read it."""
        settings = read_settings(path)
        return (
            gr.Image(path, alt_text=settings["prompt"]),
            settings_list(settings),
            gr.DownloadButton(value=path, interactive=True),
        )

    def show_earlier(self, paths: list[str], event: gr.SelectData) -> tuple:
        return self.shown(paths[event.index])

    def fitting_sizes(self, start: str) -> tuple:
        """The sizes nearest to those of a picture; what is wrong with it is said when it is used."""
        try:
            image = read_upload(start)
        except ValueError:
            return gr.skip(), gr.skip()
        return self.ranges["width"].nearest(image.width), self.ranges["height"].nearest(image.height)

    def fill_in(self, event: gr.SelectData) -> dict:
        """An example's settings, into the form for it."""
        _, settings, start = self.examples[event.index]
        form, tab = (self.text_form, "text") if start is None else (self.image_form, "image")
        controls = {control: settings[name] for name, control in form.controls.items() if name in settings}
        # Only files of the cache are served; the model's folder is none of its business.
        first = {} if start is None else {form.start: save_file_to_cache(start, form.start.GRADIO_CACHE)}
        return {self.tabs: gr.Tabs(selected=tab), form.random_seed: False} | first | controls


def launch(page: Page, host: str, port: int | None) -> str:
    """
    Start to serve a page, without a request to any other machine.

    Args:
        page (`Page`): The page.
        host (`str`): Address to listen on.
        port (`int`, *optional*): Port to listen on; by default the first free one from 7860.

    Returns:
        `str`: Where the page is.

    Raises:
        `OSError`: The port is taken, or there is no such address.
    """
    try:
        _, address, _ = page.app.launch(
            server_name=host,
            server_port=port,
            theme=THEME,
            css=CSS,
            max_file_size=MAX_UPLOAD_BYTES,
            state_session_capacity=KEPT_VISITORS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        ports = "any of the ports from 7860" if port is None else f"the port {port}"
        raise OSError(f"{ports} of {host} cannot be listened on: choose another --port or --host") from error
    return address

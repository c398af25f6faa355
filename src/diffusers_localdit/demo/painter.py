"""A model that paints one picture at a time, step by step, and stops when nobody waits for it any more."""

import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from PIL import Image

from .. import __version__
from ..loading import PIPELINE_ARGUMENTS, default_settings, load_pipeline
from ..model_info import BUNDLED_NAME, locate
from ..pipeline_localdit import LocalDiTPipeline
from ..pipeline_localdit_img2img import LocalDiTImg2ImgPipeline


class Step(NamedTuple):
    """How far a picture has come."""

    done: int
    total: int


class Painter:
    """
    Loads a model for both tasks.

    Args:
        model (`str`): Folder, repository id, or name of the bundled model.
        dtype (`str`): Of the weights and of computing, like `"float32"`.
        device (`str`): Where to compute, like `"cpu"`.

    Raises:
        `ValueError`: The model cannot be loaded, or is no LocalDiT.
    """

    def __init__(self, model: str, dtype: str, device: str):
        source = BUNDLED_NAME if model == BUNDLED_NAME else str(locate(model))
        loaded_as = {"model": source, "dtype": dtype, "device": device}
        self.text_to_image = load_pipeline(LocalDiTPipeline, loaded_as, offload="none")
        self.image_to_image = LocalDiTImg2ImgPipeline.from_pipe(self.text_to_image)
        for pipe in (self.text_to_image, self.image_to_image):
            pipe.set_progress_bar_config(disable=True)
        scheduler = type(self.text_to_image.scheduler).__name__
        self.made_by = loaded_as | {"scheduler": scheduler, "version": __version__}
        side = self.text_to_image.transformer.config.sample_size * self.text_to_image.vae_scale_factor
        default_size = {"width": side, "height": side}
        self.defaults = default_settings(self.image_to_image) | default_size | {"prompt": "", "seed": 0}
        # A single thread: the pipelines share their components and keep state, and a picture that was given up may
        # still be at its last step.
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.closed = threading.Event()

    def close(self) -> None:
        """Stops the picture that is being painted after its step, so that the process can end."""
        self.closed.set()

    def paint(self, settings: Mapping[str, Any], image: Image.Image | None = None) -> Iterator[Step | Image.Image]:
        """
        Paint one picture.

        Args:
            settings (`Mapping[str, Any]`): As in a picture's file, see `png_settings`; with `prompt` and `seed`.
            image (`PIL.Image.Image`, *optional*): The picture to start from.

        Yields:
            `Step` or `PIL.Image.Image`: Each step when it is done, at the end the picture. Closing the iterator
            before that stops the pipeline after the step that it is at.

        Raises:
            `ValueError`: The pipeline refuses the settings, or the painter was closed.
        """
        pipe, inputs = (self.text_to_image, {}) if image is None else (self.image_to_image, {"image": image})
        arguments = {argument: settings[name] for name, argument in PIPELINE_ARGUMENTS.items() if name in settings}
        steps = queue.SimpleQueue()
        given_up = threading.Event()

        def on_step_end(pipe, step, timestep, tensors):
            pipe._interrupt = given_up.is_set() or self.closed.is_set()
            steps.put(Step(step + 1, pipe.num_timesteps))
            return tensors

        generator = torch.Generator().manual_seed(settings["seed"])
        running = self.thread.submit(
            pipe, settings["prompt"], generator=generator, callback_on_step_end=on_step_end, **arguments, **inputs
        )
        running.add_done_callback(lambda _: steps.put(None))
        try:
            while (step := steps.get()) is not None:
                yield step
        finally:
            given_up.set()
            if not running.cancel():
                wait([running])
        picture = running.result().images[0]
        if self.closed.is_set():
            raise ValueError("The demo is about to end")
        yield picture

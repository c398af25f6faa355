"""The demo in a browser, for `localdit demo` and for a Space: the same app. It needs the extra `demo`."""

import argparse

from diffusers.utils.torch_utils import get_device

from ..key_mapping import DTYPES
from ..loading import default_dtype, usable_device
from ..model_info import BUNDLED_NAME

HOST = "127.0.0.1"


def serve(
    model: str = BUNDLED_NAME,
    host: str = HOST,
    port: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """
    Load a model and serve the app until the process is told to end.

    Args:
        model (`str`, defaults to the bundled one): Folder, repository id, or name of the bundled model.
        host (`str`, defaults to `"127.0.0.1"`): Address to listen on; `"0.0.0.0"` is every one of the machine.
        port (`int`, *optional*): Port to listen on; by default the first free one from 7860.
        device (`str`, *optional*): Where to compute; the accelerator by default, if there is one, else the CPU.
        dtype (`str`, *optional*):
            Of weights and computing; by default bfloat16 where the device has instructions for it, float32 elsewhere.

    Raises:
        `ValueError`: gradio is missing, or the model cannot be loaded.
        `OSError`: The port is taken.
    """
    from .examples import examples_of
    from .painter import Painter

    try:
        from .app import Page, launch
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo needs {error.name}: pip install 'diffusers-localdit[demo]'") from error

    device = usable_device(device or get_device())
    painter = Painter(model, dtype or default_dtype(device), str(device))
    page = Page(painter, examples_of(model))
    address = launch(page, host, port)
    print(f"The demo of {model} is at {address} (Ctrl-C ends it)", flush=True)
    try:
        page.app.block_thread()
    finally:
        painter.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the demo on a parser (or subparser), for `run`."""
    parser.add_argument(
        "--model", metavar="DIR_OR_REPO", default=BUNDLED_NAME, help="folder or repository id (default: %(default)s)"
    )
    parser.add_argument("--host", default=HOST, help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    parser.add_argument("--port", type=port_number, help="default: the first free one from 7860")
    parser.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES.values()),
        help="default: bfloat16 where the device has instructions for it, float32 elsewhere",
    )


def port_number(value: str) -> int:
    if not 1 <= int(value) < 2**16:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to 65535")
    return int(value)


def run(args: argparse.Namespace) -> None:
    """Carry out what `add_arguments` parsed."""
    serve(args.model, args.host, args.port, args.device, args.dtype)

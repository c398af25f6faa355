"""Takes pictures of the demo in a browser, in the widths of a desktop and of a telephone: those in `docs`."""

import argparse
import io
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

PROMPT = "a red circle left of a blue square on a white background"
SEED = "0"
SIZES = {1280: 900, 390: 844}  # heights by widths


def take(browser: Browser, address: str, width: int) -> Image.Image:
    """The whole page after a picture was made on it."""
    page = browser.new_page(viewport={"width": width, "height": SIZES[width]}, color_scheme="light")
    page.set_default_timeout(300_000)  # on a slow machine
    page.goto(address)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Random seed").uncheck()
    page.get_by_label("Seed", exact=True).fill(SEED)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("status").filter(has_text="Done").wait_for(timeout=0)
    # Not "networkidle": the page keeps a connection open.
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.evaluate("document.activeElement.blur()")
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True, animations="disabled")))
    page.close()
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder (default: %(default)s)")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser (default: %(default)s)")
    args = parser.parse_args(argv)

    args.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "diffusers_localdit", "demo"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split(" is at ")[1].split()[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
            for width in SIZES:
                path = args.output / f"demo_{width}.png"
                take(browser, address, width).convert("RGB").save(path, optimize=True)
                print(path)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()

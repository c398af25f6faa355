"""The demo as a visitor sees it: in a real browser, from a real server, on this machine only."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from diffusers_localdit.png_settings import read_settings

for module in ("gradio", "playwright"):
    pytest.importorskip(module, reason=f"the demo is tested in a browser with {module} (extra dev)")
CHROMIUM = "/usr/bin/chromium"
if not os.path.exists(CHROMIUM):
    pytest.skip(f"there is no {CHROMIUM} (Debian's package chromium)", allow_module_level=True)

from demo_server import serving_bundled_model  # noqa: E402
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

DESKTOP, TELEPHONE = 1280, 390
expect.set_options(timeout=120_000)  # waits are for what happens, however slow the machine is


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Of a server that is told to reach all but this machine by a proxy, where nobody ever calls."""
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        variables = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        outside = dict.fromkeys(variables, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with serving_bundled_model(tmp_path_factory.mktemp("demo"), **outside) as server:
            yield server.address
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, address: str, width: int = DESKTOP) -> Iterator[Page]:
    """The page; in the end its console has to be silent, and all that it asked for has to be on this server."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    complaints, foreign = [], []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    local = (f"{address}/", "data:", f"blob:{address}/")
    context.on("request", lambda request: request.url.startswith(local) or foreign.append(request.url))
    page.goto(address)
    expect(page.get_by_role("button", name="Generate")).to_be_visible()
    yield page
    context.close()
    assert (complaints, foreign) == ([], [])


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    with visiting(browser, address) as page:
        yield page


def panel(page: Page):
    """The form that is shown."""
    return page.get_by_role("tabpanel").filter(visible=True)


def set_number(page: Page, label: str, value: float) -> None:
    field = panel(page).get_by_label(re.compile(rf"^(number input for )?{label}", re.IGNORECASE)).first
    field.fill(str(value))
    field.blur()


def make_quick(page: Page, seed: int, size: int = 64, steps: int = 2) -> None:
    for label, value in (("Width", size), ("Height", size), ("Steps", steps)):
        set_number(page, label, value)
    panel(page).get_by_label("Random seed").uncheck()
    panel(page).get_by_label("Seed", exact=True).fill(str(seed))


def expect_status(page: Page, text: str | re.Pattern) -> None:
    expect(page.locator(".status").get_by_role("status")).to_have_text(text)


def generate(page: Page) -> None:
    panel(page).get_by_role("button", name="Generate").click()
    expect_status(page, "Done")


def setting(page: Page, name: str):
    return page.locator("dt", has_text=re.compile(f"^{name}$")).locator("xpath=following-sibling::dd")


def downloaded(page: Page, folder: Path) -> dict:
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").or_(page.get_by_role("button", name="Download")).first.click()
    assert re.fullmatch(r"localdit-\d+\.png", download.value.suggested_filename)
    download.value.save_as(folder / "picture.png")
    return read_settings(folder / "picture.png")


def test_generate(page, tmp_path):
    panel(page).get_by_label("Prompt", exact=True).fill("a blue square on a grey background")
    make_quick(page, seed=7)
    generate(page)
    picture = page.get_by_alt_text("a blue square on a grey background").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 64]
    wanted = {
        "prompt": "a blue square on a grey background",
        "seed": 7,
        "steps": 2,
        "guidance_scale": 1.5,
        "width": 64,
    }
    assert downloaded(page, tmp_path).items() >= wanted.items()
    for name, value in (("Seed", "7"), ("Steps", "2"), ("Guidance scale", "1.5")):
        expect(setting(page, name)).to_have_text(value)


def test_earlier_pictures_come_back_with_their_settings(page, tmp_path):
    make_quick(page, seed=1)
    generate(page)
    make_quick(page, seed=2)
    panel(page).get_by_role("button", name="Generate").click()
    expect(setting(page, "Seed")).to_have_text("2")
    page.locator(".earlier").get_by_role("button").nth(1).click()
    expect(setting(page, "Seed")).to_have_text("1")
    assert downloaded(page, tmp_path)["seed"] == 1


def test_cancel(page):
    make_quick(page, seed=1, size=256, steps=50)
    panel(page).get_by_role("button", name="Generate").click()
    expect_status(page, re.compile(r"Step \d+ of 50"))
    panel(page).get_by_role("button", name="Cancel").click()
    expect_status(page, "No picture was made")
    expect(page.locator("dl")).to_have_count(0)  # no picture came

    make_quick(page, seed=3)
    statuses = page.evaluate_handle("""() => {
        const seen = [];
        new MutationObserver(() => seen.push(document.querySelector('.status [role=status]')?.innerText ?? ''))
            .observe(document.body, {subtree: true, childList: true, characterData: true});
        return seen;
    }""")
    generate(page)
    assert not [text for text in statuses.json_value() if text.endswith("of 50")]
    expect(setting(page, "Seed")).to_have_text("3")


def test_image_to_image(page, tmp_path):
    Image.linear_gradient("L").resize((96, 50)).save(tmp_path / "sketch.png")
    page.get_by_role("tab", name="Image to image").click()
    panel(page).locator("input[type=file]").set_input_files(tmp_path / "sketch.png")
    width = panel(page).get_by_label(re.compile("^number input for Width", re.IGNORECASE))
    expect(width).to_have_value("96")  # follows the sketch
    panel(page).get_by_label("Prompt", exact=True).fill("a red circle on a white background")
    set_number(page, "Steps", 4)
    set_number(page, "Strength", 0.5)
    generate(page)
    expect(setting(page, "Strength")).to_have_text("0.5")
    settings = downloaded(page, tmp_path)
    assert (settings["width"], settings["height"], settings["image"]) == (96, 48, "sketch.png")


def test_an_example_fills_in_the_form(page):
    prompts = ("three green triangles on a black background", "a red circle above a large green circle on a white ")
    for prompt, tab in zip(prompts, ("Text to image", "Image to image")):
        page.locator(".examples").get_by_alt_text(prompt).click()
        expect(panel(page).get_by_label("Prompt", exact=True)).to_have_value(re.compile(prompt))
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        expect(panel(page).get_by_label("Random seed")).not_to_be_checked()
    expect(panel(page).locator("img")).to_be_visible()
    set_number(page, "Steps", 4)
    generate(page)
    expect(setting(page, "Image")).to_have_text("sketch-of-two-circles.png")


def test_errors_are_messages(page, tmp_path):
    def expect_message(text: str) -> None:
        panel(page).get_by_role("button", name="Generate").click()
        expect(page.get_by_test_id("toast-body").filter(has_text=text)).to_be_visible()
        expect_status(page, "No picture was made")

    panel(page).get_by_label("Prompt", exact=True).fill("")
    expect_message("Prompt is empty; say what to draw")

    page.get_by_role("tab", name="Image to image").click()
    expect_message("There is no picture to start from; choose one")
    Image.new("1", (5000, 5000)).save(tmp_path / "bomb.png")
    panel(page).locator("input[type=file]").set_input_files(tmp_path / "bomb.png")
    expect(panel(page).get_by_role("img").first).to_be_visible()
    expect_message("The picture has 5,000 x 5,000 pixels; at most 16,777,216 are taken")


def test_by_keyboard_alone(page):
    def focused() -> str:
        return page.evaluate("""() => {
            const element = document.activeElement;
            const label = element.labels?.[0]?.innerText ?? element.getAttribute('aria-label') ?? element.innerText;
            return label.trim().split('\\n')[0];
        }""")

    passed = []

    def tab_to(name: str) -> None:
        while focused() != name:
            page.keyboard.press("Tab")
            passed.append(focused())
            assert len(passed) < 100, passed

    tab_to("Prompt")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("a green triangle on a white background")
    tab_to("Seed")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("9")
    tab_to("Random seed")
    page.keyboard.press("Space")
    tab_to("Generate")
    page.keyboard.press("Enter")
    expect_status(page, "Done")
    expect(setting(page, "Prompt")).to_have_text("a green triangle on a white background")
    expect(setting(page, "Seed")).to_have_text("9")
    passed.clear()
    tab_to("Cancel")
    tab_to("Download PNG with its settings")


@pytest.mark.parametrize("width", [DESKTOP, TELEPHONE])
def test_nothing_is_wider_than_the_screen(width, browser, address):
    wider = """() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('*')]
        .filter(element => element.getBoundingClientRect().right > innerWidth + 0.5)
        .map(element => element.className)"""
    with visiting(browser, address, width) as page:
        assert page.evaluate(wider) == []
        make_quick(page, seed=1)
        generate(page)
        assert page.evaluate(wider) == []
        page.get_by_role("tab", name="Image to image").click()
        expect(panel(page).get_by_label("Prompt", exact=True)).to_be_visible()
        assert page.evaluate(wider) == []

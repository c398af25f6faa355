"""How the page looks. Fonts are those of the visitor's system: nothing is fetched from anywhere."""

import html
from collections.abc import Mapping
from typing import Any

import gradio as gr

THEME = gr.themes.Default(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="md",
    font=["Inter", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
    font_mono=["SFMono-Regular", "Consolas", "DejaVu Sans Mono", "monospace"],
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_text_color="white",
)

CSS = """
.gradio-container main { box-sizing: border-box; width: 100%; max-width: 1240px; margin: 0 auto; }
.header h1 { margin: 0; font-size: 1.6rem; letter-spacing: -0.02em; }
.header p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); }
.seed .block:has(> label > [type=checkbox]) { display: flex; align-items: center; }
.status [role=status] { min-height: 1.5em; font-weight: 600; font-variant-numeric: tabular-nums; }
.status progress { display: block; width: 100%; height: 6px; border: 0; border-radius: 3px; overflow: hidden;
  appearance: none; background: var(--border-color-primary); color: var(--primary-600); }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.status progress::-webkit-progress-value { background: var(--primary-600); transition: width 0.2s; }
.status progress::-moz-progress-bar { background: var(--primary-600); }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.settings dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr));
  gap: 0.4rem 1rem; margin: 0; }
.settings dl > div.long { grid-column: 1 / -1; }
.settings dt { font-size: 0.75rem; color: var(--body-text-color-subdued); }
.settings dd { margin: 0; overflow-wrap: anywhere; }
.settings p { margin: 0; color: var(--body-text-color-subdued); }
.pictures .grid-wrap { height: auto; min-height: 0; max-height: none; padding-top: 2.2rem; overflow: visible; }
.pictures .grid-container { grid-template: none / repeat(auto-fit, minmax(var(--picture), 1fr)); grid-auto-rows: auto;
  height: auto; align-items: start; }
.pictures .thumbnail-item { aspect-ratio: auto; height: auto; }
.pictures .thumbnail-item img { aspect-ratio: 1; height: auto; border-radius: 0; }
.pictures .caption-label { position: static; max-width: none; padding: 0.3rem 0.4rem; border: 0; border-radius: 0;
  box-shadow: none; background: none; white-space: normal; font-size: 0.75rem; line-height: 1.25; }
.examples { --picture: 9rem; }
.earlier { --picture: 6rem; }
.earlier .grid-container { grid-template-columns: repeat(auto-fill, minmax(var(--picture), 1fr)); }
.earlier .caption-label { display: none; }
"""

NO_SETTINGS = "<p>The settings of the picture will be here.</p>"
LONG_SETTINGS = ("prompt", "negative_prompt", "image", "scheduler")
UNSHOWN_SETTINGS = ("image_sha256", "version")


def label_of(name: str) -> str:
    return name.replace("_", " ").capitalize()


def header(title: str, *lines: str) -> str:
    return f"<h1>{html.escape(title)}</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)


def status(text: str, done: int = 0, total: int = 1) -> str:
    bar = f'<progress value="{done}" max="{total}" aria-hidden="true"></progress>'
    return f'<div role="status">{html.escape(text)}</div>{bar}'


def settings_list(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<div class="{"long" if name in LONG_SETTINGS else ""}"><dt>{label_of(name)}</dt>'
        f"<dd>{html.escape(str(value)) or '(none)'}</dd></div>"
        for name, value in settings.items()
        if name not in UNSHOWN_SETTINGS
    )
    return f"<dl>{rows}</dl>"

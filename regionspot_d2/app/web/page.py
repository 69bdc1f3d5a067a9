"""How the web page is laid out, and how it looks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_image_annotation import image_annotator

from ...data.datasets.vocabularies import VOCABULARIES
from ...modeling import RegionSpot
from .events import Page, Parts, status_line
from .inputs import Box
from .session import TOP

# Questions that wait; whoever asks more is told that the page is busy.
_MAX_WAITING = 256
# Uploads and pictures older than this are deleted, and how often that is looked after; seconds.
_KEEP, _LOOK = 6 * 3600, 600
_TABLE = {"#": "11%", "name": "31%", "score": "20%", "box": "38%"}

# Photos that scikit-image has, with words to begin with and boxes of what is on them.
_EXAMPLES: dict[str, tuple[str, list[Box]]] = {
    "chelsea.png": ("cat, dog, sofa", [[15, 0, 451, 300]]),
    "coffee.png": ("cup, bowl, spoon", [[170, 12, 418, 292]]),
    "astronaut.png": ("person, helmet, flag", [[15, 8, 380, 512], [278, 342, 512, 512]]),
}

_HEADER = """
<header class="title"><h1>RegionSpot</h1>
<p>Name any region of a photo with any words. Draw boxes or click points, type words, and see which
word fits which region.</p></header>
"""

CSS = """
.gradio-container { max-width: 1360px !important; width: 100%; margin: auto; }
.gradio-container .html-container { padding: 4px 0; }
.caption { font-size: var(--text-sm); color: var(--body-text-color-subdued); }
.title h1 { font-size: 1.7rem; font-weight: 700; margin: 0; letter-spacing: -0.01em; }
.title p { margin: 0.2rem 0 0; color: var(--body-text-color-subdued); }
/* The photo and the picture of the results on the left, what is asked and answered on the right; in
   a narrow window one after another, with the picture last. */
#board { display: grid; grid-template-columns: 3fr 2fr; grid-template-rows: auto 1fr;
  align-items: start; }
#board > * { min-width: 0 !important; }
#talk { grid-area: 1 / 2 / 3 / 3; }
#table th, #table td { padding: 4px 6px !important; }
#table td, #table th, #table span { font-family: var(--font); font-size: var(--text-sm); }
#table th * { white-space: nowrap; padding-left: 0; padding-right: 0; }
@media (max-width: 800px) {
  #board { grid-template-columns: 100%; }
  #talk { grid-area: auto; }
}
.status { padding: 0.6rem 0.8rem; border-radius: 8px; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); border-left: 4px solid var(--primary-500); }
.status.error { border-left-color: #dc2626; color: #b91c1c; background: #fef2f2; }
.dark .status.error { color: #fecaca; background: #450a0a; }
"""


def _caption(text: str) -> str:
    return f'<div class="caption">{text}</div>'


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own machine, and calm colors."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")


def build_page(page: Page) -> gr.Blocks:
    """Lays the page out and joins it with its events.

    Questions about the model wait in one queue and are answered one after another.
    """
    with gr.Blocks(
        title="RegionSpot", analytics_enabled=False, delete_cache=(_LOOK, _KEEP)
    ) as blocks:
        session = gr.State(None, time_to_live=_KEEP)
        gr.HTML(_HEADER)
        with gr.Row(elem_id="board"):
            with gr.Column():
                photo, clicks, no_points = _photo_parts()
                examples = gr.Column()
            with gr.Column(elem_id="talk"):
                words, lists, zoom, name, everything = _question_parts(page.model)
                status = gr.HTML(status_line("Upload a photo, or pick an example."))
                table, top, attention, download = _answer_parts(
                    page.model.region_head.has_attention
                )
            with gr.Column():
                gr.HTML(_caption("Results; click a region to select it"))
                picture = gr.Image(
                    format="jpeg",
                    interactive=False,
                    show_label=False,
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
        with examples:
            _example_parts(photo, words)
        outputs = [*Parts(session, status, picture, clicks, table, top, attention, download)]
        inputs = [session, photo, words, lists, zoom]  # as in Shown
        # Uploads come as they are, so that it is read_image that reads them.
        common: dict[str, Any] = {
            "inputs": inputs,
            "outputs": outputs,
            "preprocess": False,
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress_on": [picture],
        }
        photo.change(page.changed, **common, trigger_mode="always_last", api_name="draw")
        gr.on([name.click, words.submit], page.named, **common, api_name="name")
        everything.click(page.everything, **common, api_name="everything")
        gr.on([lists.change, zoom.release], page.again, **common, api_name="again")
        clicks.select(page.clicked, **common, api_visibility="private")
        no_points.click(page.no_points, **common, api_visibility="private")
        common |= {"inputs": [session], "api_visibility": "private"}
        table.select(page.chosen_row, **common)
        picture.select(page.chosen_place, **common)
    return blocks.queue(max_size=_MAX_WAITING)


def _photo_parts() -> tuple[image_annotator, gr.Image, gr.Button]:
    with gr.Tabs():
        with gr.Tab("Draw boxes"):
            photo = image_annotator(
                sources=["upload", "clipboard"],
                image_type="filepath",
                disable_edit_boxes=True,
                boxes_alpha=0.15,
                show_label=False,
                show_download_button=False,
                elem_id="photo",
            )
        with gr.Tab("Click points"):
            clicks = gr.Image(
                format="jpeg", interactive=False, show_label=False, elem_id="points", buttons=[]
            )
            no_points = gr.Button("Remove the points", size="sm")
    return photo, clicks, no_points


def _question_parts(
    model: RegionSpot,
) -> tuple[gr.Textbox, gr.CheckboxGroup, gr.Slider, gr.Button, gr.Button]:
    words = gr.Textbox(
        label="Words", placeholder="cat, dog, sofa", max_length=100_000, elem_id="words"
    )
    lists = gr.CheckboxGroup(list(VOCABULARIES), label="and all names of")
    zoom = gr.Slider(
        0,
        4,
        value=model.zoom,
        step=0.25,
        label="Zoom",
        info="How much of the photo is seen around a region, in times its size; 0 for all of it.",
    )
    with gr.Row():
        name = gr.Button("Name regions", variant="primary", size="md", elem_id="name")
        everything = gr.Button("Find regions", size="md", elem_id="everything")
    return words, lists, zoom, name, everything


def _answer_parts(
    has_attention: bool,
) -> tuple[gr.Dataframe, gr.Label, gr.Image, gr.DownloadButton]:
    table = gr.Dataframe(
        headers=list(_TABLE),
        column_widths=list(_TABLE.values()),
        datatype=["number", "str", "number", "str"],
        interactive=False,
        label="Best name of each region",
        buttons=[],
        max_height=280,
        wrap=True,
        elem_id="table",
    )
    top = gr.Label(num_top_classes=TOP, show_heading=False, visible=False, elem_id="top")
    gr.HTML(_caption("Where the head looks to name the selected region"), visible=has_attention)
    attention = gr.Image(
        show_label=False,
        buttons=["fullscreen"],
        format="jpeg",
        interactive=False,
        visible=False,
        elem_id="attention",
    )
    download = gr.DownloadButton(
        "Download as COCO json", size="md", interactive=False, elem_id="download"
    )
    return table, top, attention, download


def example_photos() -> list[Path]:
    """The photos that visitors may pick; none without scikit-image, which has them."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return []
    paths = (Path(spec.origin).parent / "data" / name for name in _EXAMPLES)
    return [path for path in paths if path.is_file()]


def _example_parts(photo: image_annotator, words: gr.Textbox) -> None:
    """Pictures to click, which put a photo, boxes and words into their parts."""
    samples, texts = [], []
    for path in example_photos():
        text, boxes = _EXAMPLES[path.name]
        # The newest first, as browsers have them.
        corners = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box)) for box in reversed(boxes)]
        samples.append({"image": str(path), "boxes": corners})
        texts.append(text)
    if samples:
        examples = gr.Dataset(
            components=[photo],
            samples=[[sample] for sample in samples],
            type="index",
            label="Examples",
            elem_id="examples",
        )
        examples.click(
            lambda place: (samples[place], texts[place]),
            examples,
            [photo, words],
            show_progress="hidden",
            api_visibility="private",
        )

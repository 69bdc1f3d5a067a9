"""What happens on the web page, and what it changes there."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from ...modeling import RegionSpot
from ..names import file_name, one_line
from .inputs import class_names, display_name, drawn_boxes
from .session import Session


class Parts(NamedTuple):
    """What an event may change, in this order; what it leaves out stays as it is."""

    session: Any = gr.skip()
    status: Any = gr.skip()
    picture: Any = gr.skip()
    points: Any = gr.skip()
    table: Any = gr.skip()
    top: Any = gr.skip()
    attention: Any = gr.skip()
    download: Any = gr.skip()


# Some of these parts, by name.
Changes = dict[str, Any]


class Shown(NamedTuple):
    """What the page shows when something happens.

    Attributes:
        photo: a photo with its boxes as ``image_annotator`` sends them, or None.
        words, lists: see :func:`~regionspot_d2.app.web.inputs.class_names`.
        zoom: see :meth:`Session.ask`.
    """

    photo: dict[str, Any] | None
    words: str
    lists: Sequence[str]
    zoom: float


class Page:
    """The events of the page. The model is shared; each visitor has a :class:`Session`.

    Events take the visitor's session, None at first, and the values of :class:`Shown`. What is
    wrong with a question is told in the status.
    """

    def __init__(self, model: RegionSpot, max_pixels: int) -> None:
        """
        Args:
            model: names the regions of all visitors.
            max_pixels: of a photo; a larger one is refused.
        """
        self.model = model
        self.max_pixels = max_pixels

    def changed(self, session: Session | None, *shown: Any) -> Parts:
        """A photo was uploaded or removed, or a box was drawn, moved or deleted."""

        def change(visitor: Session, page: Shown) -> Changes:
            boxes = drawn_boxes(page.photo)
            # Browsers tell of a box before it has a size; and of clicks that change nothing.
            if any(x0 == x1 or y0 == y1 for x0, y0, x1, y1 in boxes):
                return {}
            if not visitor.draw(boxes) and visitor.answer is not None:
                return {}
            return self._ask_gently(visitor, page)

        return self._tell(session, change, shown)

    def named(self, session: Session | None, *shown: Any) -> Parts:
        """The button that names boxes and points was pressed."""

        def ask(visitor: Session, page: Shown) -> Changes:
            visitor.draw(drawn_boxes(page.photo))
            visitor.ask(class_names(page.words, page.lists), page.zoom)
            return self._answer(visitor)

        return self._tell(session, ask, shown)

    def everything(self, session: Session | None, *shown: Any) -> Parts:
        """The button that finds regions was pressed."""

        def ask(visitor: Session, page: Shown) -> Changes:
            visitor.ask_everything(class_names(page.words, page.lists), page.zoom)
            return self._answer(visitor)

        return self._tell(session, ask, shown)

    def again(self, session: Session | None, *shown: Any) -> Parts:
        """Words, lists or zoom were changed: the last question is asked again."""
        return self._tell(session, self._ask_gently, shown)

    def clicked(self, session: Session | None, event: gr.SelectData, *shown: Any) -> Parts:
        """A point was clicked."""

        def ask(visitor: Session, page: Shown) -> Changes:
            visitor.click(*event.index)
            return {"points": visitor.points_picture()} | self._ask_gently(visitor, page)

        return self._tell(session, ask, shown)

    def no_points(self, session: Session | None, *shown: Any) -> Parts:
        """The button that removes the points was pressed."""

        def ask(visitor: Session, page: Shown) -> Changes:
            visitor.points.clear()
            return {"points": visitor.points_picture()} | self._ask_gently(visitor, page)

        return self._tell(session, ask, shown)

    def chosen_row(self, session: Session | None, event: gr.SelectData) -> Parts:
        """A row of the table was selected."""
        return self._tell(
            session, lambda visitor, _: self._region(visitor, int(event.row_value[0]))
        )

    def chosen_place(self, session: Session | None, event: gr.SelectData) -> Parts:
        """A place in the picture of the results was clicked."""

        def show(visitor: Session, _: Shown) -> Changes:
            region = visitor.region_at(*event.index)
            return {} if region is None else self._region(visitor, region)

        return self._tell(session, show)

    def _tell(
        self,
        session: Session | None,
        change: Callable[[Session, Shown], Changes],
        shown: Sequence[Any] = (),
    ) -> Parts:
        """What an event changes, or the line that says why it cannot."""
        visitor = session or Session(self.model, self.max_pixels)
        changes: Changes = {}
        try:
            if shown:
                changes = self._open(visitor, shown[0])
            changes |= change(visitor, Shown(*shown))
        except (OSError, RuntimeError, ValueError) as error:  # torch's are RuntimeErrors
            if visitor.photo is None:
                changes = _no_results() | {"points": None}
            changes["status"] = status_line(one_line(error), is_error=True)
        return Parts(**changes, session=visitor)

    def _open(self, visitor: Session, photo: dict[str, Any] | None) -> Changes:
        """Sets the photo; returns what changes if it is another one."""
        if not photo:
            visitor.clear()
            return _no_results() | {"points": None}
        file, turns = photo["image"], photo.get("orientation") or 0
        name = display_name(file["path"], file.get("orig_name"))
        if not visitor.set_photo(file["path"], name, turns):
            return {}
        return _no_results() | {"points": visitor.points_picture()}

    def _ask_gently(self, visitor: Session, page: Shown) -> Changes:
        """Names the regions, or says what is missing, which is no error before anyone asked."""
        visitor.draw(drawn_boxes(page.photo))
        if visitor.photo is None:
            hint = "Upload a photo, or pick an example."
        elif not visitor.boxes and not visitor.points and not visitor.found_everything:
            height, width = visitor.size
            hint = f"A photo of {width} x {height} pixels. Draw a box, or click a point."
        elif not page.words.strip() and not page.lists:
            hint = "Type words, or choose a list, and press Enter."
        else:
            visitor.ask_again(class_names(page.words, page.lists), page.zoom)
            return self._answer(visitor)
        return _no_results() | {"status": status_line(hint)}

    def _answer(self, visitor: Session) -> Changes:
        answer = visitor.answer
        assert answer is not None
        rows, names = answer.rows(), len(answer.names)
        regions = f"{len(rows)} region{'' if len(rows) == 1 else 's'}"
        changes = _no_results() | {
            "status": status_line(f"{regions} named with {names} words. {answer.note}"),
            "picture": visitor.picture(),
            "table": rows,
        }
        if not rows:
            return changes
        data = json.dumps(answer.coco(), indent=1).encode()
        stem = file_name(Path(answer.entry["file_name"]).stem)
        changes["download"] = gr.DownloadButton(
            value=save_bytes_to_cache(data, f"{stem}.coco.json", get_upload_folder()),
            interactive=True,
        )
        # What was drawn last; of what was found, the best.
        selected = rows[0 if visitor.found_everything else -1][0]
        return changes | self._region(visitor, selected)

    def _region(self, visitor: Session, region: int) -> Changes:
        assert visitor.answer is not None
        top = visitor.answer.tops[region]
        label = f"Region {region}: best {len(top)} of {len(visitor.answer.names)} names"
        changes: Changes = {"top": gr.Label(value=top, label=label, visible=True)}
        if self.model.region_head.has_attention:
            changes["attention"] = gr.Image(value=visitor.attention(region), visible=True)
        return changes


def status_line(text: str, *, is_error: bool = False) -> str:
    """One line under the buttons, as HTML; nothing in the text is taken for a tag."""
    kind, role = ("status error", "alert") if is_error else ("status", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def _no_results() -> Changes:
    return {
        "picture": None,
        "table": [],
        "top": gr.Label(value=None, visible=False),
        "attention": gr.Image(value=None, visible=False),
        "download": gr.DownloadButton(interactive=False),
    }

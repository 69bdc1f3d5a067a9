"""Serves the web page: ``regionspot web``."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regionspot_cli import parse_web

from ...engine import load_config
from ...modeling import RegionSpot
from ...predictor import RegionSpotPredictor
from ...pretrained import check_device
from ...stopping import INTERRUPTED, stoppable
from ..names import one_line
from .events import Page
from .page import CSS, build_page, example_photos, theme

# Visitors whose photos are held at once; the photo of one who comes back later is encoded again.
_MAX_SESSIONS = 16
# Pixels of a photo, unless INPUT.MAX_PIXELS is less: the photos of 16 visitors take 2.4 GB at most.
_MAX_PIXELS = 50_000_000
# Browsers load, send and run nothing from or to elsewhere, whatever a library's page names.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'"


class ContentSecurity:
    """Adds the policy to every answer of the server (ASGI middleware)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


@contextmanager
def served(
    model: RegionSpot,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_pixels: int = _MAX_PIXELS,
    max_megabytes: int = 20,
) -> Iterator[str]:
    """Serves the page while the block runs.

    Args:
        model: names the regions of all visitors.
        host: what to listen on; "0.0.0.0" lets other machines in.
        port: None for the first free one from 7860 on.
        max_pixels: of a photo.
        max_megabytes: of an upload.

    Yields:
        The address of the page.

    Raises:
        OSError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Uploads and pictures are of this run, and nobody else's.
    with tempfile.TemporaryDirectory(prefix="regionspot_web_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = build_page(Page(model, max_pixels))
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size=max_megabytes * 2**20,
                allowed_paths=list(map(str, example_photos())),
                state_session_capacity=_MAX_SESSIONS,
                theme=theme(),
                css=CSS,
                app_kwargs={"middleware": [Middleware(ContentSecurity)]},
            )
            yield address
        finally:
            blocks.close(verbose=False)


def main(arguments: Sequence[str]) -> int:
    """Serves the page until Ctrl-C or SIGTERM.

    Args:
        arguments: the command line of ``regionspot web``.

    Returns:
        The exit status.

    Raises:
        SystemExit: the page cannot be served, with one line that says why.
    """
    args = parse_web(arguments)
    try:
        with stoppable():
            cfg = load_config(args.config_file, args.opts, training=False)
            check_device(cfg.MODEL.DEVICE)
            model = RegionSpotPredictor(cfg).model
            with served(
                model,
                host=args.host,
                port=args.port,
                max_pixels=min(cfg.INPUT.MAX_PIXELS, _MAX_PIXELS),
                max_megabytes=args.max_upload,
            ) as address:
                print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
                # Gradio prints a line per file of its components that a browser loads.
                with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
                    threading.Event().wait()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        # str() of a KeyError is the repr of its message.
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise SystemExit(f"error: {one_line(reason)}") from error
    return 0

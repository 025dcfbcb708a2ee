"""The web application of the review page: its pages, pictures, forms and events."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sortd.config import Config
from sortd.errors import SortdError
from sortd.review import acts, live, pages
from sortd.review.effects import Effects
from sortd.review.figures import Evaluations
from sortd.review.index import Index
from sortd.review.pictures import Pictures

SIDES = {"160.jpg": 160, "1024.jpg": 1024}
"""Longer sides, in pixels, of the pictures that are served."""
PICTURE_THREADS = 12
"""Pictures that are waited for at once: those that two browsers ask for."""
_NO_PICTURE = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="160" height="160">'
    b'<path d="M40 40L120 120M120 40L40 120" stroke="#888" stroke-width="6"/></svg>'
)


def create_app(config: Config) -> Starlette:
    """Return the application; what it holds is closed when the server ends."""
    index = Index(config)
    effects, evaluations, pictures = Effects(index), Evaluations(config), Pictures(config)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        pictures.start()
        warmed = threading.Thread(target=_warm, args=(index,), daemon=True)
        warmed.start()
        yield
        for one in (index, evaluations, pictures):
            one.close()

    app = Starlette(
        routes=[*pages.routes, *acts.routes, *live.routes, Route("/picture/{identifier}/{name}", picture)],
        exception_handlers=pages.error_handlers,
        lifespan=lifespan,
    )
    app.state.config, app.state.index, app.state.effects = config, index, effects
    app.state.evaluations, app.state.pictures = evaluations, pictures
    # Threads of their own: images that take long to decode leave those of the pages free.
    app.state.picture_threads = CapacityLimiter(PICTURE_THREADS)
    return app


def _warm(index: Index) -> None:
    """Read what the first page shows, which takes a second for ten thousand images."""
    with suppress(SortdError):  # the page itself says what is wrong
        for layout in index.datasets():
            index.batches(layout)


async def picture(request: Request) -> Response:
    """Return a picture of the image with an id, which names one version of one file and so never changes."""
    image = request.app.state.index.find(request.path_params["identifier"])
    side = SIDES.get(request.path_params["name"])
    content = None
    if image is not None and side is not None:
        jpeg = partial(request.app.state.pictures.jpeg, image.path, image.stamp, image.content, side)
        content = await run_sync(jpeg, limiter=request.app.state.picture_threads)
    if content is None:
        return Response(_NO_PICTURE, 404, media_type="image/svg+xml", headers={"Cache-Control": "no-store"})
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(content, media_type="image/jpeg", headers=headers)

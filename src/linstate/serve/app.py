"""The application: a service, its routes, and what stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from linstate import __version__
from linstate.engine.language_model import LanguageModel
from linstate.serve import completions, prefill, problems, responses, search, states, system
from linstate.serve.access import Access
from linstate.serve.router import Pool
from linstate.serve.service import Service
from linstate.serve.settings import Settings


def create_app(settings: Settings, model: LanguageModel | None = None, pool: Pool | None = None) -> FastAPI:
    """The application for ``settings``; ``model``, ``pool`` as in :class:`linstate.serve.service.Service`.

    Raises:
        CheckpointError: the model cannot be loaded. InputError: the store or the keys cannot be opened.
    """
    service = Service(settings, model, pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="Linstate",
        version=__version__,
        summary="OpenAI's interface, and states that are kept, forked and shared.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    problems.install(app)
    app.include_router(system.router(service))
    if settings.role != "prefill":
        for room in (completions, responses, search, states):
            app.include_router(room.router(service))
    if settings.role != "decode":
        app.include_router(prefill.router(service))
    app.add_middleware(Access, service=service)
    app.state.service = service
    return app

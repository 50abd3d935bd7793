"""``/v1/prefill``: reading for other servers."""

from __future__ import annotations

from fastapi import APIRouter

from linstate.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    return APIRouter()

"""The planes of the service and their OpenAPI document, without a database or a LiteLLM."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from proxy.api.openapi import OpenApi
from proxy.api.planes import Plane, planes_of
from proxy.app import assemble
from proxy.settings import load_settings


async def made_planes(directory: Path) -> list[Plane]:
    """Put the services together on nothing, for their operations alone."""
    settings = load_settings(
        {},
        database_url="postgresql://nowhere.invalid/none",
        litellm_url="http://nowhere.invalid",
        admin_key="none",
        data_dir=directory,
    )
    parts = assemble(settings)
    try:
        return planes_of(parts.services)
    finally:
        parts.services.spool.close()
        await parts.services.control.close()
        await parts.upstream.close()


def planes() -> list[Plane]:
    """Every plane."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(made_planes(Path(directory)))


def document() -> dict[str, Any]:
    """The document that `/openapi.json` answers."""
    return OpenApi(planes()).document()

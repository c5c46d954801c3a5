"""Every path but the data plane's, as one Starlette application."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from proxy.api.internal import InternalApi
from proxy.api.openapi import OpenApi
from proxy.api.planes import planes_of
from proxy.api.services import Services
from proxy.api.web import Envelope, refuse_route

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def make_application(services: Services, lifespan: Lifespan) -> Starlette:
    """Put the account API, the admin API, the ops endpoints and the internal one together."""
    planes = planes_of(services)
    application = Starlette(
        routes=[
            *(route for plane in planes for route in plane.routes),
            *OpenApi(planes).routes(),
            *InternalApi(services).routes(),
        ],
        middleware=[
            Middleware(
                Envelope,
                log=services.request_log,
                addresses=services.protection.addresses,
                hsts_max_age_s=services.protection.hsts_max_age_s,
            )
        ],
        exception_handlers={HTTPException: refuse_route},
        lifespan=lifespan,
    )
    # A redirect would send a credential twice, and a path with a slash too many is a mistake.
    application.router.redirect_slashes = False
    return application

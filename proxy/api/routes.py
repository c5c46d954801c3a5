"""Every path but the data plane's, as one Starlette application."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from proxy.api.account import AccountApi
from proxy.api.admin import AdminApi
from proxy.api.internal import InternalApi
from proxy.api.ops import Ops
from proxy.api.services import Services
from proxy.api.web import Envelope, refuse_route

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def make_application(services: Services, lifespan: Lifespan) -> Starlette:
    """Put the account API, the admin API, the ops endpoints and the internal one together."""
    application = Starlette(
        routes=[
            *Ops(services).routes(),
            *AccountApi(services).routes(),
            *AdminApi(services).routes(),
            *InternalApi(services).routes(),
        ],
        middleware=[Middleware(Envelope)],
        exception_handlers={HTTPException: refuse_route},
        lifespan=lifespan,
    )
    # A redirect would send a credential twice, and a path with a slash too many is a mistake.
    application.router.redirect_slashes = False
    return application

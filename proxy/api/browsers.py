"""Pages of other origins that may call the service from a browser: CORS."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

# For how long a browser need not ask again whether it may call.
_PREFLIGHT_S = 600
_SHOWN_TO_PAGES = [
    "x-request-id",
    "request-id",
    "retry-after",
    "x-should-retry",
    "x-tallygate-charge-credits",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
]


def open_to_browsers(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of these origins call every plane; with none, nothing stands in between."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        # Keys come in headers, and SDKs send a dozen of their own. Cookies mean nothing here.
        allow_headers=["*"],
        expose_headers=_SHOWN_TO_PAGES,
        max_age=_PREFLIGHT_S,
    )

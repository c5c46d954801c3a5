"""What is answered when prices are published, whichever way: the version, or what is in the way."""

from typing import Any, Literal

from starlette.responses import Response

from pricing.errors import InvalidPriceBookError
from proxy.api import answers
from proxy.api.bodies import Body, Count, TimeToCome
from proxy.api.paths import ADMIN
from proxy.api.shapes import Shapes
from proxy.api.web import answer
from proxy.errors import ConflictError, InvalidRequestError
from proxy.price_books import PriceBooks, Publication

PRICE_BOOKS = ADMIN + "/price-books"
# A book of ten thousand rules has its place in it.
MAX_DOCUMENT_BYTES = 4 * 1024 * 1024

_MAX_VERSION = 2**31 - 1


class Publish(Body):
    """POST …/publish: for a time to come, or now.

    It is refused where the version that would be in force then is another than `based_on`.
    """

    at: TimeToCome | None = None
    based_on: Count | None = None


class Published(answers.PriceBook):
    """The version that says so; `overtaken` were to come after it, and never will."""

    outcome: Literal["published", "unchanged", "exists"]
    overtaken: list[int]


async def published(books: PriceBooks, shapes: Shapes, done: Publication) -> Response:
    """Answer a publication; ConflictError for one that came too late."""
    if done.outcome == "stale" or done.version is None:
        message = (
            f"Version {done.version} of the price book would be in force then, and this was not "
            f"made from it. Look at the difference, then send based_on {done.version}."
        )
        raise ConflictError(message, param="based_on", details={"version": done.version})
    if done.outcome == "published":
        # Here at once, on the other replicas within seconds.
        await books.refresh()
    row: Any = await books.version(done.version)
    shape: Any = {**shapes.price_book(row), "outcome": done.outcome, "overtaken": done.overtaken}
    return answer(shape)


def version_or_none(text: str) -> int | None:
    """Read the number of a version; None for what can't be one."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_VERSION))):
        return None
    version = int(text)
    return version if version <= _MAX_VERSION else None


def refused(error: InvalidPriceBookError, param: str) -> InvalidRequestError:
    """Say where a price book is wrong, and what to do."""
    return InvalidRequestError(f"The price book is wrong at {error}.", param=param)


def nothing_published() -> ConflictError:
    """What is said before the first publication."""
    return ConflictError("No price book was published yet. Start the service with a config.yaml.")

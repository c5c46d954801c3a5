"""What the relay needs to know of a stream, whatever its format is."""

from typing import Protocol

from pricing.usage import Usage


class StreamMeter(Protocol):
    """Reads one stream while it goes by; made anew for each.

    `feed` gives back what may leave at once; the end of the stream, from the usage on, is held
    back until it is settled, and `closing` writes it then. However the stream is cut into chunks,
    the client gets the same bytes and the meter reads the same usage.

    Attributes:
        usage: the tokens, once the stream has told them.
        cost_text: LiteLLM's cost in USD, in the digits that it came in; None where the stream has
            none that can be trusted.
        model: the model that answered, from the first event that names it.
        answer_id: the provider's id of the answer.
        service_tier: the tier that served it, where the provider says so.
        saw_done: whether the stream came to its end.
        error: the JSON of an event that is an error; nothing after it is passed on.
    """

    usage: Usage | None
    cost_text: str | None
    model: str | None
    answer_id: str | None
    service_tier: str | None
    saw_done: bool
    error: bytes | None

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the upstream and return those that may leave now."""
        ...

    def end(self) -> None:
        """Note that the upstream ended."""
        ...

    def closing(self, price_usd_text: str | None) -> bytes:
        """Return the end of the stream for the client, with what it was charged (None: unknown)."""
        ...

    @property
    def output_bytes(self) -> int:
        """UTF-8 bytes of what the model has said in what was passed on."""
        ...

    @property
    def has_final_usage(self) -> bool:
        """Whether the usage is that of the whole answer."""
        ...


class PlainMeter:
    """A body of bytes with nothing to read in it: sound. Its last chunk is held back."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.cost_text: str | None = None
        self.model: str | None = None
        self.answer_id: str | None = None
        self.service_tier: str | None = None
        self.saw_done = False
        self.error: bytes | None = None
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return the chunk before this one."""
        held, self._held = self._held, chunk
        return held

    def end(self) -> None:
        """Note that the body is whole."""
        self.saw_done = True

    def closing(self, price_usd_text: str | None) -> bytes:
        """Return the last chunk."""
        del price_usd_text  # there is no place for it in sound
        return self._held

    @property
    def output_bytes(self) -> int:
        """Nothing that could be counted as words."""
        return 0

    @property
    def has_final_usage(self) -> bool:
        """What is paid for was known before."""
        return False

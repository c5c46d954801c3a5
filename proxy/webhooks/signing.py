"""Signatures as Standard Webhooks has them (github.com/standard-webhooks, version 1.0.0)."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from uuid import UUID

_PREFIX = "whsec_"
_SECRET_BYTES = 32


def new_secret() -> str:
    """Make a secret: 256 random bits, as base64 behind `whsec_`."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def signed_headers(
    secrets_: Sequence[str], event_id: UUID, body: bytes, *, now_s: int
) -> dict[str, str]:
    """Headers for this body: a signature by each secret, any of which the receiver may know.

    `now_s` is Unix time; receivers refuse what is minutes off, so each attempt is signed anew.
    """
    signed = b"%s.%d.%s" % (str(event_id).encode(), now_s, body)
    signatures = [
        base64.b64encode(
            hmac.digest(base64.b64decode(secret.removeprefix(_PREFIX)), signed, hashlib.sha256)
        ).decode()
        for secret in secrets_
    ]
    return {
        "webhook-id": str(event_id),
        "webhook-timestamp": str(now_s),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }

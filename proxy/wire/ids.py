"""Ids of answers, as far as a customer may see them."""

import base64
import binascii
import re

# LiteLLM's id of an answer that it got over another API than the one that was asked: base64 of
# "litellm:custom_llm_provider:…;model_id:…;response_id:…".
_BRIDGED = re.compile(rb"litellm:.*;response_id:(.+)", re.DOTALL)


def public_id(answer_id: str | None) -> str | None:
    """Return an id without what LiteLLM wrote into it about deployments."""
    if answer_id is None or not answer_id.startswith("resp_"):
        return answer_id
    packed = answer_id.removeprefix("resp_")
    try:
        unpacked = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        return answer_id
    bridged = _BRIDGED.fullmatch(unpacked)
    return answer_id if bridged is None else bridged[1].decode(errors="replace")

"""Random bodies of LiteLLM's own names, on every endpoint: whatever comes back, the books hold."""

from importlib.util import find_spec
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.endpoints import ENDPOINTS
from proxy.errors import InvalidRequestError
from proxy.firewall import DROPPED, check_body
from tests.e2e.surface import EVIL, Surface, surface
from tests.support.calls import CALLS
from tests.support.litellm_names import Names

__all__ = ["surface"]

HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    10**30,
    1e308,
    0.001,
    "",
    " ",
    "x",
    "true",
    "priority",
    "dear",
    "free",
    "openai/free",
    "anthropic",
    EVIL,
    f"http://{EVIL}.invalid/v1",
    "os.environ/PROVIDER_KEY",
    "\x00\u202e",
    "x" * 5000,
    [],
    ["dear"],
    [{"priced": ["dear"]}],
    [[1, 2], [3]],
    {},
    {"Authorization": f"Bearer {EVIL}"},
    {"model": "dear"},
    {"type": "mcp", "server_url": f"http://{EVIL}.invalid"},
    {"include_usage": False, "tallygate": {"live_cost": True}},
    {"a": {"b": [{"c": None}]}},
]
# A call's own names with other values may well change what it costs.
EXAMPLES = 24


def names_for(path: str, known: Names) -> tuple[list[str], list[str]]:
    """Names that pass or are dropped on an endpoint, and all that LiteLLM knows."""
    endpoint = ENDPOINTS[path]
    every = known.settings.union(known.in_code, *known.endpoints.values())
    every |= endpoint.policy.allowed | endpoint.policy.files
    passing = set(endpoint.policy.allowed | DROPPED)
    for name in every:
        try:
            check_body({name: msgspec.Raw(b'"x"')}, endpoint.policy)
        except InvalidRequestError:
            continue
        passing.add(name)
    return sorted(passing - {"model"}), sorted(every - {"model"})


@pytest.mark.skipif(find_spec("litellm") is None, reason="LiteLLM is not installed")
@pytest.mark.parametrize("path", CALLS)
def test_no_body_of_litellms_names_changes_price_route_credentials_or_others(
    surface: Surface, litellm_names: Names, path: str
) -> None:
    call = CALLS[path]
    passing, every = names_for(path, litellm_names)
    own_names = ENDPOINTS[path].policy.allowed

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        st.dictionaries(
            st.one_of(st.sampled_from(passing), st.sampled_from(passing), st.sampled_from(every)),
            st.sampled_from(HOSTILE),
            min_size=1,
            max_size=4,
        )
    )
    def attack(members: dict[str, Any]) -> None:
        surface.begin(call)
        answer = call.send(surface.client, surface.attacker.customer.key, members)
        surface.assert_harmless(call, answer, same_price=not members.keys() & own_names)

    attack()

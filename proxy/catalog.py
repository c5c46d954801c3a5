"""The models that LiteLLM offers, with their prices and limits, as it last told us.

Read at start and at intervals. While LiteLLM is away the last answer goes on being used, and it is
kept on disk, so that a proxy that starts without LiteLLM knows its models too.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from pricing.errors import PricingError
from pricing.rating import ModelPrices, is_free, merge_ceiling, parse_model_prices
from proxy.control import CONTROL_ERRORS, LiteLLMControl

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """One name that customers can ask for; several deployments may stand behind it.

    `prices` are the dearest of them, None where any has no price; `deployments` has those of each
    by LiteLLM's id of it. `provider` is None where they differ.
    """

    name: str
    prices: ModelPrices | None
    max_input_tokens: int | None
    max_output_tokens: int | None
    mode: str | None
    provider: str | None
    has_one_deployment: bool = True
    # All of them, also where `provider` is None.
    providers: frozenset[str] = frozenset()
    deployments: Mapping[str, ModelPrices | None] = field(
        default_factory=dict[str, ModelPrices | None]
    )

    def prices_of(self, deployment_id: str | None) -> ModelPrices | None:
        """Return the prices of the deployment that answered; the dearest where it is not known."""
        return self.deployments.get(deployment_id or "", self.prices)

    def is_priced_exactly(self, deployment_id: str | None) -> bool:
        """Whether `prices_of` are those of the one that answered, and not an upper bound."""
        return self.has_one_deployment or (deployment_id or "") in self.deployments


class Catalog:
    """Looks models up; `run` keeps it fresh."""

    def __init__(
        self, control: LiteLLMControl, cache: Path | None, *, free_models: Sequence[str] = ()
    ) -> None:
        self._control = control
        self._cache = cache
        self._free_models = tuple(free_models)
        self._models: dict[str, Model] = {}
        self._read_at: float | None = None
        self._made_at = time.monotonic()

    @property
    def is_known(self) -> bool:
        """Whether LiteLLM, or the copy on disk, ever told what there is."""
        return bool(self._models)

    def age_s(self) -> float:
        """Seconds since LiteLLM last answered; since the start, if it never did."""
        return time.monotonic() - (self._read_at or self._made_at)

    def get(self, name: str) -> Model | None:
        """Find a model by the name that customers use."""
        return self._models.get(name)

    def all(self) -> list[Model]:
        """Every model, by name."""
        return sorted(self._models.values(), key=lambda model: model.name)

    async def refresh(self) -> bool:
        """Read from LiteLLM; False, with everything as it was, where it does not answer."""
        try:
            rows = await self._control.models()
            models = read_models(rows, self._free_models)
        except CONTROL_ERRORS as error:
            log.warning("catalog not refreshed", extra={"error": type(error).__name__})
            return False
        self._models = models
        self._read_at = time.monotonic()
        if self._cache is not None:
            await asyncio.to_thread(_write, self._cache, msgspec.json.encode(rows))
        return True

    def load_cache(self) -> None:
        """Take the copy on disk, if there is one that can be read."""
        if self._cache is None or not self._cache.exists():
            return
        try:
            rows = msgspec.json.decode(self._cache.read_bytes())
            self._models = read_models(rows, self._free_models)
        except (*CONTROL_ERRORS, msgspec.DecodeError) as error:
            log.warning("catalog cache ignored", extra={"error": str(error)})

    async def run(self, *, interval_s: float) -> None:
        """Refresh until cancelled; soon again while LiteLLM has never answered."""
        while True:
            await asyncio.sleep(interval_s if self._read_at is not None else min(1, interval_s))
            await self.refresh()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.replace(path)


def read_models(
    rows: Sequence[Mapping[str, Any]], free_models: Sequence[str] = ()
) -> dict[str, Model]:
    """Read `/model/info`: one entry a deployment, several of one name make one model.

    LiteLLM writes zeros for the models of its price map that it has no prices of. So a price of
    zero is believed of those that `free_models`, names or patterns, say are free, and of
    moderations; any other is as good as none.
    """
    deployments: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for row in rows:
        deployments.setdefault(str(row["model_name"]), []).append(
            (row.get("model_info") or {}, row.get("litellm_params") or {})
        )
    return {
        name: _model(name, found, may_be_free=any(fnmatchcase(name, free) for free in free_models))
        for name, found in deployments.items()
    }


def _model(
    name: str,
    deployments: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    *,
    may_be_free: bool,
) -> Model:
    infos = [info for info, _ in deployments]
    prices = [_prices(name, info, may_be_free=may_be_free) for info in infos]
    providers = {_provider(info, params) for info, params in deployments}
    known_providers = frozenset(provider for provider in providers if provider is not None)
    return Model(
        name=name,
        prices=merge_ceiling(prices),
        max_input_tokens=_largest(infos, "max_input_tokens"),
        max_output_tokens=_largest(infos, "max_output_tokens", "max_tokens"),
        mode=next((str(info["mode"]) for info in infos if info.get("mode")), None),
        provider=providers.pop() if len(providers) == 1 else None,
        has_one_deployment=len(infos) == 1,
        providers=known_providers,
        deployments={
            str(info["id"]): own for info, own in zip(infos, prices, strict=True) if "id" in info
        },
    )


def _prices(name: str, info: Mapping[str, Any], *, may_be_free: bool) -> ModelPrices | None:
    try:
        prices = parse_model_prices(info)
    except PricingError as error:
        # A price that can't be read is no price: the model's calls go to review.
        log.warning("price ignored", extra={"model": name, "error": str(error)})
        return None
    may_be_free = may_be_free or info.get("mode") == "moderation"
    return None if prices is not None and is_free(prices) and not may_be_free else prices


def _largest(infos: Sequence[Mapping[str, Any]], *names: str) -> int | None:
    """Return the largest limit among the deployments; None if one of them names none."""
    limits = [next((info[name] for name in names if info.get(name)), None) for info in infos]
    known = [int(limit) for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def _provider(info: Mapping[str, Any], params: Mapping[str, Any]) -> str | None:
    if params.get("custom_llm_provider"):
        return str(params["custom_llm_provider"])
    prefix, slash, _ = str(params.get("model") or "").partition("/")
    if slash:
        return prefix
    provider = info.get("litellm_provider")
    return str(provider) if provider else None

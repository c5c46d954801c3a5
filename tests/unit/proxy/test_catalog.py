"""The catalog: what LiteLLM says, merged by name, kept while it is away."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

from proxy.catalog import Catalog, read_models
from proxy.control import LiteLLMControl

pytestmark = pytest.mark.anyio

URL = "http://litellm.test"


def row(name: str, model: str = "openai/x", **info: Any) -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model}, "model_info": info}


PRICED: dict[str, Any] = {"input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06}


async def test_models_are_read_with_prices_limits_and_provider() -> None:
    models = read_models([row("a", "anthropic/claude", max_output_tokens=9, mode="chat", **PRICED)])
    model = models["a"]
    assert model.prices is not None
    assert (model.provider, model.max_output_tokens, model.max_input_tokens, model.mode) == (
        "anthropic",
        9,
        None,
        "chat",
    )


async def test_deployments_of_one_name_are_taken_at_their_dearest_and_largest() -> None:
    dear: dict[str, Any] = {"input_cost_per_token": 5e-06, "output_cost_per_token": 1e-06}
    (model,) = read_models(
        [
            row("a", max_output_tokens=10, max_input_tokens=5, **PRICED),
            row("a", "azure/x", max_output_tokens=20, **dear),
        ]
    ).values()
    assert model.prices is not None
    assert max(model.prices.tokens.values()) == 5_000_000
    assert (model.max_output_tokens, model.max_input_tokens, model.provider) == (20, None, None)


async def test_one_unpriced_deployment_makes_the_model_unpriced() -> None:
    (model,) = read_models([row("a", **PRICED), row("a")]).values()
    assert model.prices is None


async def test_price_that_can_not_be_read_is_no_price(caplog: pytest.LogCaptureFixture) -> None:
    (model,) = read_models([row("a", input_cost_per_token="cheap")]).values()
    assert model.prices is None
    assert "price ignored" in caplog.text


async def test_provider_is_found_where_litellm_puts_it() -> None:
    explicit = row("a")
    explicit["litellm_params"] = {"model": "x", "custom_llm_provider": "groq"}
    assert read_models([explicit])["a"].provider == "groq"
    assert read_models([row("a", "gpt-4o", litellm_provider="openai")])["a"].provider == "openai"
    assert read_models([row("a", "gpt-4o")])["a"].provider is None


@respx.mock
async def test_last_answer_is_used_while_litellm_is_away_and_after_a_restart(
    tmp_path: Path,
) -> None:
    route = respx.get(f"{URL}/model/info")
    route.mock(return_value=httpx.Response(200, json={"data": [row("a", **PRICED)]}))
    control = LiteLLMControl(URL, "sk")
    catalog = Catalog(control, tmp_path / "catalog.json")
    assert not catalog.is_known
    assert await catalog.refresh()
    for answer in (
        httpx.ConnectError("away"),
        httpx.Response(500),
        httpx.Response(200, text="garbage"),
        httpx.Response(200, json={"no": "data"}),
    ):
        route.mock(side_effect=[answer])
        assert not await catalog.refresh()
        assert catalog.get("a") is not None
    again = Catalog(control, tmp_path / "catalog.json")
    again.load_cache()
    assert [model.name for model in again.all()] == ["a"]
    await control.close()


async def test_damaged_copy_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "catalog.json").write_text("{")
    control = LiteLLMControl(URL, "sk")
    for path in (tmp_path / "catalog.json", tmp_path / "none.json", None):
        catalog = Catalog(control, path)
        catalog.load_cache()
        assert not catalog.is_known
    await control.close()


def test_zero_is_a_price_only_of_models_that_are_meant_to_be_free() -> None:
    zero: dict[str, Any] = {"input_cost_per_token": 0, "output_cost_per_token": 0.0}
    rows = [
        row("llama-local", **zero),
        row("gone-free", **zero),
        # What LiteLLM makes of a model of its price map that it has no price of.
        row("snowflake", **zero, mode="chat"),
        row("moderate", **zero, mode="moderation"),
        row("pictures", **zero, output_cost_per_image=0.04),
        row("embed", input_cost_per_token=1e-8, output_cost_per_token=0),
    ]
    models = read_models(rows, ["llama-*", "gone-free"])
    priced = {name for name, model in models.items() if model.prices is not None}
    assert priced == {"llama-local", "gone-free", "moderate", "pictures", "embed"}

"""The witness in the configuration of the LiteLLM child."""

import pytest

from proxy.embedded.litellm_config import WitnessAddress, child_config

WITNESS = WitnessAddress("http://127.0.0.1:4000", "the-token")
OURS = "tallygate_witness.witness"


@pytest.mark.parametrize(
    "own, callbacks",
    [
        (None, [OURS]),
        ([], [OURS]),
        ("own.handler", ["own.handler", OURS]),
        (["prometheus", "own.handler"], ["prometheus", "own.handler", OURS]),
    ],
)
def test_it_stands_behind_the_operators_own_callbacks(own: object, callbacks: list[str]) -> None:
    section = {"litellm_settings": {"callbacks": own}}
    child = child_config(section, master_key="sk-m", environ={}, witness=WITNESS)
    assert child.document["litellm_settings"]["callbacks"] == callbacks
    assert section == {"litellm_settings": {"callbacks": own}}


def test_its_address_is_in_the_environment_and_its_token_in_no_file() -> None:
    environ = {"TALLYGATE_WITNESS_TOKEN": "another", "TALLYGATE_ADMIN_KEY": "secret"}
    child = child_config({}, master_key="sk-m", environ=environ, witness=WITNESS)
    ours = {name: text for name, text in child.environ.items() if name.startswith("TALLYGATE_")}
    assert ours == {
        "TALLYGATE_WITNESS_URL": "http://127.0.0.1:4000",
        "TALLYGATE_WITNESS_TOKEN": "the-token",
    }
    assert "the-token" not in str(child.document)


def test_without_an_address_there_is_none() -> None:
    child = child_config({}, master_key="sk-m", environ={"TALLYGATE_WITNESS_TOKEN": "x"})
    assert "callbacks" not in child.document["litellm_settings"]
    assert not [name for name in child.environ if name.startswith("TALLYGATE_")]

import pytest

from proxy.embedded.litellm_config import QUIET, child_config

KEYED = {
    "model_name": "gpt",
    "litellm_params": {"model": "openai/gpt", "api_key": "os.environ/OPENAI_API_KEY"},
}
PLAIN = {"model_name": "demo", "litellm_params": {"model": "openai/demo", "api_key": "none"}}


def test_what_metering_needs_is_added_to_what_the_operator_wrote() -> None:
    section = {
        "model_list": [PLAIN],
        "litellm_settings": {"drop_params": True, "num_retries": 3},
        "general_settings": {"max_parallel_requests": 7},
    }

    document = child_config(section, master_key="sk-m", environ={}).document

    assert document == {
        "model_list": [PLAIN],
        "litellm_settings": {
            "request_timeout": 900,
            "drop_params": True,
            "num_retries": 3,
            "telemetry": False,
            "include_cost_in_streaming_usage": True,
            "cache": False,
        },
        "general_settings": {
            "max_parallel_requests": 7,
            "master_key": "sk-m",
            "always_include_stream_usage": True,
        },
        "router_settings": {"disable_cooldowns": True},
    }


def test_an_empty_section_makes_a_configuration_without_models() -> None:
    document = child_config({"model_list": None}, master_key="sk-m", environ={}).document

    assert document["model_list"] == []


def test_the_operator_may_choose_timeout_and_cooldowns_but_not_the_cache() -> None:
    section = {
        "litellm_settings": {"request_timeout": 60, "cache": True},
        "router_settings": {"disable_cooldowns": False},
    }

    document = child_config(section, master_key="sk-m", environ={}).document

    assert document["litellm_settings"]["request_timeout"] == 60
    assert document["litellm_settings"]["cache"] is False
    assert document["router_settings"]["disable_cooldowns"] is False


def test_the_operators_section_is_left_as_it_is() -> None:
    section: dict[str, object] = {"model_list": [KEYED], "general_settings": {}}

    child_config(section, master_key="sk-m", environ={"OPENAI_API_KEY": "k"})

    assert section == {"model_list": [KEYED], "general_settings": {}}


def test_a_provider_key_reaches_the_child_under_a_name_litellm_does_not_look_up() -> None:
    environ = {"OPENAI_API_KEY": "secret", "PATH": "/bin"}

    child = child_config({"model_list": [KEYED]}, master_key="sk-m", environ=environ)

    (model,) = child.document["model_list"]
    assert model["litellm_params"]["api_key"] == "os.environ/TALLYGATE_UPSTREAM_OPENAI_API_KEY"
    assert child.environ == {
        "PATH": "/bin",
        **QUIET,
        "TALLYGATE_UPSTREAM_OPENAI_API_KEY": "secret",
    }


@pytest.mark.parametrize("environ", [{}, {"OPENAI_API_KEY": ""}])
def test_a_model_whose_key_is_not_set_is_left_out_and_logged(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        child = child_config({"model_list": [KEYED, PLAIN]}, master_key="m", environ=environ)

    assert child.document["model_list"] == [PLAIN]
    (record,) = caplog.records
    assert (vars(record)["model"], vars(record)["variables"]) == ("gpt", ["OPENAI_API_KEY"])


@pytest.mark.parametrize(
    "name",
    [
        "DATABASE_URL",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "ANTHROPIC_AUTH_TOKEN",
        "AZURE_API_KEY",
        "GOOGLE_API_KEY",
        "REDIS_URL",
        "TALLYGATE_DATABASE_URL",
        "TALLYGATE_ADMIN_KEY",
        "COVERAGE_PROCESS_CONFIG",
        "PYTHONDONTWRITEBYTECODE",
        "DEBUG",
        "PORT",
    ],
)
def test_what_litellm_would_look_up_by_itself_stays_behind(name: str) -> None:
    child = child_config({}, master_key="m", environ={name: "x", "AWS_REGION": "eu"})

    assert name not in child.environ
    assert child.environ["AWS_REGION"] == "eu"


def test_references_are_found_in_lists_and_outside_of_models() -> None:
    section = {
        "environment_variables": {"LANGFUSE_SECRET_KEY": "os.environ/LANGFUSE_SECRET_KEY"},
        "litellm_settings": {"callbacks": ["langfuse", "os.environ/CALLBACK"]},
        "model_list": [{"model_name": "m", "litellm_params": {"tags": ["os.environ/TAG"]}}],
    }
    environ = {"LANGFUSE_SECRET_KEY": "s", "TAG": "t"}

    child = child_config(section, master_key="m", environ=environ)

    prefix = "os.environ/TALLYGATE_UPSTREAM_"
    assert child.document["environment_variables"] == {
        "LANGFUSE_SECRET_KEY": f"{prefix}LANGFUSE_SECRET_KEY"
    }
    assert child.document["litellm_settings"]["callbacks"] == ["langfuse", f"{prefix}CALLBACK"]
    assert child.document["model_list"][0]["litellm_params"]["tags"] == [f"{prefix}TAG"]
    assert child.environ["TALLYGATE_UPSTREAM_TAG"] == "t"
    assert "TALLYGATE_UPSTREAM_CALLBACK" not in child.environ

"""What an operator can set: `config.yaml`, each value overridable by the environment.

A flat setting `port` is `TALLYGATE_PORT`; a member of a section is `TALLYGATE_HOLDS__TTL_S`.
Only `app` and `cli` read this; every other module gets plain arguments.
"""

import os
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from proxy.errors import ConfigurationError
from proxy.tiers import Tiers


def _decimal_text(value: object) -> str:
    """Accept YAML numbers as well as strings, and keep the digits the operator typed."""
    text = str(value)
    try:
        number = Decimal(text)
    except InvalidOperation:
        msg = f"{text!r} is not a decimal number"
        raise ValueError(msg) from None
    if not number.is_finite() or number < 0:
        msg = f"{text!r} must be a finite number of at least 0"
        raise ValueError(msg)
    return text


DecimalText = Annotated[str, BeforeValidator(_decimal_text)]


def _network_text(value: object) -> str:
    text = str(value)
    try:
        return str(ip_network(text))
    except ValueError as error:
        msg = f"{error}: write a network such as 10.0.0.0/8"
        raise ValueError(msg) from None


NetworkText = Annotated[str, BeforeValidator(_network_text)]


def _origin_text(value: object) -> str:
    text = str(value)
    if text != "*" and not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?", text):
        msg = f'{text!r} is no origin: write it as https://console.example.com, or "*" for any'
        raise ValueError(msg)
    return text


OriginText = Annotated[str, BeforeValidator(_origin_text)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class UpstreamSettings(_Section):
    """How LiteLLM is spoken to."""

    connect_timeout_s: float = Field(default=5.0, gt=0)
    # Between two bytes of an answer; a reasoning model may think for minutes before the first.
    read_timeout_s: float = Field(default=900.0, gt=0)
    max_connections: int = Field(default=2000, ge=1)
    max_answer_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    max_event_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    # After the client hung up: how much more of the answer is read to learn its price.
    drain_timeout_s: float = Field(default=120.0, gt=0)
    drain_bytes: int = Field(default=64 * 1024 * 1024, ge=0)
    catalog_refresh_s: float = Field(default=30.0, gt=0)


class RepeatSettings(_Section):
    """Answers that are kept for requests that come again."""

    # With the client's Idempotency-Key: in PostgreSQL, for every replica.
    idempotency_ttl_s: int = Field(default=86_400, ge=60)
    idempotency_answer_bytes: int = Field(default=1024 * 1024, ge=0)
    idempotency_account_bytes: int = Field(default=64 * 1024 * 1024, ge=0)
    # An SDK's own retry: in the memory of each worker.
    retry_ttl_s: float = Field(default=120.0, ge=0)
    retry_answer_bytes: int = Field(default=4 * 1024 * 1024, ge=0)
    retry_bytes: int = Field(default=64 * 1024 * 1024, ge=0)


class HoldSettings(_Section):
    """How long money is set aside for a request that has not ended."""

    ttl_s: int = Field(default=300, ge=5)
    heartbeat_s: float = Field(default=60.0, gt=0)
    sweep_interval_s: float = Field(default=15.0, gt=0)
    # A hold is expired only this long after its time, so that the spool of a proxy that was
    # cut off from PostgreSQL gets to replay what it knows before the sweeper gives up on it.
    sweep_grace_s: int = Field(default=60, ge=0)

    @model_validator(mode="after")
    def _outlive_two_heartbeats(self) -> Self:
        # A request that begins right after one is extended by the next but one.
        if self.ttl_s <= 2 * self.heartbeat_s:
            msg = "ttl_s must be more than twice heartbeat_s, or live requests lose their holds"
            raise ValueError(msg)
        return self


class AdmissionSettings(_Section):
    """How the ceiling of a request is estimated."""

    default_hold_credits: DecimalText = "100"
    # A clamped answer shorter than this is worth nothing: the client gets a 402 instead.
    min_output_tokens: int = Field(default=16, ge=1)
    tokens_per_image: int = Field(default=4096, ge=0)
    tokens_per_audio_clip: int = Field(default=16384, ge=0)
    tokens_per_file: int = Field(default=65536, ge=0)
    principal_cache_s: float = Field(default=5.0, ge=0)


class ApiLimitSettings(_Section):
    """How often the account and admin APIs may be called, in each worker."""

    account_per_minute: int = Field(default=600, ge=1)
    admin_per_minute: int = Field(default=600, ge=1)
    # Wrong keys from one address, on every plane, before it is refused unheard.
    failures_per_minute: int = Field(default=30, ge=1)


class CorsSettings(_Section):
    """Which pages may call the service from a browser; none unless they are named."""

    # Such as https://console.example.com, or "*" for any.
    allowed_origins: list[OriginText] = []


class WebhookSettings(_Section):
    """How operators' receivers are told what happens."""

    # To http:// and to addresses that are not the internet's: for receivers beside the service.
    allow_http: bool = False
    allow_private: bool = False
    # How often accounts are looked at for something to tell.
    watch_interval_s: float = Field(default=3.0, gt=0)
    timeout_s: float = Field(default=10.0, gt=0, le=120)
    # Until the second attempt; each wait is three times the one before, up to the longest.
    retry_s: float = Field(default=5.0, gt=0)
    retry_max_s: float = Field(default=14_400.0, gt=0)
    give_up_s: float = Field(default=259_200.0, gt=0, le=2_592_000)
    retention_days: int = Field(default=30, ge=1, le=3650)


class TierSettings(_Section):
    """What accounts of a tier may do and are given; what is left out is not limited, or nothing."""

    # Patterns such as gpt-*.
    allowed_models: list[str] | None = Field(default=None, min_length=1)
    # Of the account as a whole, beside the limits of its keys.
    requests_per_minute: int | None = Field(default=None, ge=1, lt=2**31)
    tokens_per_minute: int | None = Field(default=None, ge=1, lt=2**63)
    max_concurrency: int | None = Field(default=None, ge=1, lt=2**31)
    # A factor: becomes a rule of the price book for the tier.
    markup: DecimalText | None = None
    # Given each month, and gone at its end.
    monthly_credits: DecimalText | None = None
    # Given once, to a new account.
    starter_credits: DecimalText | None = None
    max_request_credits: DecimalText | None = None

    @model_validator(mode="after")
    def _sell_at_cost_at_least(self) -> Self:
        if self.markup is not None and Decimal(self.markup) < 1:
            msg = "markup must be at least 1: what may sell below cost is a rule of price_book"
            raise ValueError(msg)
        return self


TierName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Settings(BaseSettings):
    """The whole configuration of one service."""

    model_config = SettingsConfigDict(
        env_prefix="TALLYGATE_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
    )
    # Read by `load_settings` before the class can be, so it is an environment name, no field.
    config_variable: ClassVar[str] = "TALLYGATE_CONFIG"
    config_file: ClassVar[Path | None] = None
    # Whether it is what came with the package, because the operator has none.
    is_packaged: ClassVar[bool] = False

    database_url: SecretStr | None = None
    litellm_url: str | None = None
    litellm_key: SecretStr | None = None
    admin_key: SecretStr | None = None
    ops_token: SecretStr | None = None
    # What the witness inside LiteLLM authenticates with; without one nobody's reports are taken.
    witness_token: SecretStr | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=4000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=64)
    # Networks of the proxies in front of the service: only theirs is X-Forwarded-For believed.
    trusted_proxies: list[NetworkText] = []
    # How long browsers are to insist on HTTPS, where something in front of the service speaks it.
    hsts_max_age_s: int = Field(default=0, ge=0)
    data_dir: Path = Path(".tallygate")
    log_level: str = "INFO"

    credit_usd: DecimalText = "0.001"
    starter_credits: DecimalText = "1000"
    default_tier: str = "default"
    max_body_bytes: int = Field(default=10 * 1024 * 1024, ge=1024)
    # A form with files, which is on disk while it is under way.
    max_upload_bytes: int = Field(default=128 * 1024 * 1024, ge=1024)
    shutdown_timeout_s: int = Field(default=120, ge=1)
    # A client that takes nothing of its stream for so long counts as gone.
    client_stall_timeout_s: float = Field(default=60.0, gt=0)
    # A stream in which nothing was said for so long gets a comment.
    keep_alive_s: float = Field(default=15.0, gt=0)
    # Names or patterns of models whose price of zero is meant: LiteLLM says zero of unknown
    # prices too.
    free_models: list[str] = []
    # How far a cost that LiteLLM reports may be from our own rating, in parts per million.
    cost_tolerance_ppm: int = Field(default=10_000, ge=0)
    # A stream that the provider cut: void and review (False), or charge what was delivered.
    charge_cut_streams: bool = False

    # Whether, and after how many days, an account that was closed loses what tells of a person.
    erase_closed_after_days: int = Field(default=0, ge=0, le=36_500)

    upstream: UpstreamSettings = UpstreamSettings()
    holds: HoldSettings = HoldSettings()
    repeats: RepeatSettings = RepeatSettings()
    admission: AdmissionSettings = AdmissionSettings()
    webhooks: WebhookSettings = WebhookSettings()
    api_limits: ApiLimitSettings = ApiLimitSettings()
    cors: CorsSettings = CorsSettings()
    # Header name -> the provider whose models the key may be used for; "*" for any.
    byok_headers: dict[str, str] = {
        "X-Provider-Key": "*",
        "X-OpenAI-Key": "openai",
        "X-Anthropic-Key": "anthropic",
        "X-Google-Key": "gemini",
    }
    # The cheapest first: an account that is refused something is told the first that has it.
    tiers: dict[TierName, TierSettings] = {}
    price_book: dict[str, Any] = {"default": {"kind": "markup", "factor": "2.0"}}
    litellm: dict[str, Any] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment over the file, the file over the defaults."""
        del dotenv_settings, file_secret_settings
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if cls.config_file is not None:
            sources += (YamlConfigSettingsSource(settings_cls, yaml_file=cls.config_file),)
        return sources

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        if self.tiers:
            _ = self.terms
        rules = self.price_book.get("rules")
        # Where it is no list, the price book itself says what is wrong with it.
        listed = cast("list[object]", rules) if isinstance(rules, list) else []
        for number, rule in enumerate(listed):
            name = _only_tier_of(rule)
            tier = self.tiers.get(name)
            if tier is not None and tier.markup is not None:
                msg = (
                    f"tiers.{name}.markup and price_book.rules[{number}] both price the tier "
                    f"{name!r}: remove one of them"
                )
                raise ValueError(msg)
        return self

    @property
    def terms(self) -> Tiers:
        """The tiers, with amounts in nano-USD; ConfigurationError where one can't be that."""
        return Tiers(
            {name: tier.model_dump() for name, tier in self.tiers.items()},
            default=self.default_tier,
            nanos_per_credit=self.nanos_per_credit,
        )

    @property
    def whole_price_book(self) -> dict[str, Any]:
        """The price book with a rule for the markup of each tier that has one."""
        rules = [
            {"tier": name, "kind": "markup", "factor": tier.markup}
            for name, tier in self.tiers.items()
            if tier.markup is not None
        ]
        if not rules:
            return self.price_book
        return {**self.price_book, "rules": [*(self.price_book.get("rules") or []), *rules]}

    @property
    def nanos_per_credit(self) -> int:
        """What one credit is worth, in nano-USD; a fraction of a nano is refused."""
        nanos = Decimal(self.credit_usd).scaleb(9)
        if nanos != int(nanos) or nanos < 1:
            msg = (
                f"credit_usd is {self.credit_usd}: it must be a positive, whole number of "
                "nano-dollars, such as 0.001"
            )
            raise ConfigurationError(msg)
        return int(nanos)


def _only_tier_of(rule: object) -> str:
    """Return the tier that a rule of the price book is for, and nothing else; "" where not so."""
    if not isinstance(rule, Mapping):
        return ""
    selectors = cast("Mapping[object, object]", rule)
    tier = selectors.get("tier")
    is_narrower = any(selectors.get(name) is not None for name in ("account", "model"))
    return tier if isinstance(tier, str) and not is_narrower else ""


_LOCAL_CONFIG = Path("config.yaml")


def default_config_path() -> Path | None:
    """`config.yaml` of the working directory, else the one that came with the package."""
    here = Path(__file__).parent
    for path in (_LOCAL_CONFIG, here / "config.yaml", here.parent / "config.yaml"):
        if path.is_file():
            return path
    return None


def load_settings(environ: Mapping[str, str] | None = None, **overrides: object) -> Settings:
    """Read file and environment.

    Raises ConfigurationError, whose text names each wrong setting, for a file that can't be
    read, an unknown name or a value out of range.
    """
    variables = environ or os.environ
    named = variables.get(Settings.config_variable)
    path = Path(named) if named else default_config_path()
    if named and not Path(named).is_file():
        msg = f"{Settings.config_variable} names {named}, and there is no such file"
        raise ConfigurationError(msg)

    class FromFile(Settings):
        config_file: ClassVar[Path | None] = path
        is_packaged: ClassVar[bool] = (
            not named
            and path != _LOCAL_CONFIG
            and not {"TALLYGATE_PRICE_BOOK", "TALLYGATE_TIERS"} & variables.keys()
        )

    try:
        return FromFile(**overrides)  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors(include_input=False)
        ]
        msg = f"the configuration ({path or 'no file'}) is wrong:\n" + "\n".join(lines)
        raise ConfigurationError(msg) from None
    except yaml.YAMLError as error:
        msg = f"{path} is not valid YAML: {error}"
        raise ConfigurationError(msg) from None

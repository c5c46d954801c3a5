"""The price book: which rule a request is sold by, and what each rule says.

A book is parsed once from a JSON document and never changes; a new price is a new version of the
whole book. Selection is deterministic: account before tier before model, an exact model name
before a pattern, the pattern with more literal characters first, and between equals the rule that
stands earlier in the document. `canonical_document` writes a book so that parsing gives an equal
book again; that is the form to store and to hash.

Amounts in a document are decimal strings, never JSON numbers with a fraction. They are held as
integers: credits in billionths (nanocredits), so that nanocredits x nanos-per-credit is a whole
number of attos (1e-18 USD) whatever a credit is worth; factors in parts per million.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from types import MappingProxyType
from typing import ClassVar, Literal, cast
from uuid import UUID

from pricing.errors import InvalidAmountError, InvalidPriceBookError
from pricing.money import PPM, decimal_text, scale_exactly
from pricing.usage import FALLBACK_CLASS, TokenClass

RuleKind = Literal["markup", "flat", "per_token"]

NANOCREDITS_PER_CREDIT = 10**9
# 1% is 10,000 parts per million.
_PPM_PER_PERCENT = PPM // 100

_MAX_CREDITS = 10**9
_MAX_FACTOR = 1000
_MAX_PERCENT = 1000
_MAX_RULES = 10_000
_MAX_NAME_LENGTH = 256

_RULE_FIELDS = ("kind", "minimum", "allow_loss", "byok_fee_percent")
_SELECTORS = ("account", "tier", "model")
_ACTION_NAME = re.compile(r"[a-z0-9][a-z0-9_.:-]{0,63}")
_WILDCARD = re.compile(r"\[[^\]]*\]|[*?]")


@dataclass(frozen=True, slots=True)
class Markup:
    """The provider's cost times a factor."""

    kind: ClassVar[RuleKind] = "markup"

    factor_ppm: int


@dataclass(frozen=True, slots=True)
class Flat:
    """The same credits for every request."""

    kind: ClassVar[RuleKind] = "flat"

    nanocredits: int


@dataclass(frozen=True, slots=True)
class PerToken:
    """Credits per 1000 tokens by class, all of them times a multiplier."""

    kind: ClassVar[RuleKind] = "per_token"

    nanocredits_per_1000: Mapping[TokenClass, int]
    multiplier_ppm: int = PPM

    def nanocredits_of(self, token_class: TokenClass) -> int:
        """Return what 1000 tokens of a class are, falling back to the class that covers it."""
        while token_class not in self.nanocredits_per_1000:
            token_class = FALLBACK_CLASS[token_class]
        return self.nanocredits_per_1000[token_class]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One way to price a request, and the requests that it is for (None: any)."""

    name: str
    terms: Markup | Flat | PerToken
    account: str | None = None
    tier: str | None = None
    model: str | None = None
    minimum_nanocredits: int = 0
    allow_loss: bool = False
    byok_fee_ppm: int = 0

    @property
    def kind(self) -> RuleKind:
        """The kind, as it is written in the document."""
        return self.terms.kind


@dataclass(frozen=True, slots=True)
class PriceBook:
    """A version of all prices: a default rule, rules for some requests, prices of actions."""

    default: Rule
    rules: tuple[Rule, ...] = ()
    action_nanocredits: Mapping[str, int] = field(default_factory=dict[str, int])
    _ranked: tuple[tuple[Rule, re.Pattern[str] | None], ...] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Sort the rules and compile their patterns, once.

        Sorting is stable: equals stay in the document's order.
        """
        ranked = sorted(self.rules, key=_specificity, reverse=True)
        object.__setattr__(self, "_ranked", tuple((rule, _pattern(rule)) for rule in ranked))

    def select(self, account_id: str, tier: str, model: str) -> Rule:
        """Return the most specific rule for a request; `account_id` is a canonical uuid text."""
        for rule, pattern in self._ranked:
            if (
                (rule.account is None or rule.account == account_id)
                and (rule.tier is None or rule.tier == tier)
                and (pattern is None or pattern.match(model))
            ):
                return rule
        return self.default

    @property
    def ranked(self) -> tuple[Rule, ...]:
        """The rules in the order in which they are tried; the default comes after them."""
        return tuple(rule for rule, _ in self._ranked)

    def rule(self, name: str) -> Rule:
        """Return the rule that a stored charge names ("default", "rules[2]"), or KeyError."""
        for rule in (self.default, *self.rules):
            if rule.name == name:
                return rule
        raise KeyError(name)

    def canonical_document(self) -> dict[str, object]:
        """Return the JSON-able document of this book: equal books give equal documents."""
        return {
            "default": rule_document(self.default),
            "rules": [rule_document(rule) for rule in self.rules],
            "actions": {
                name: _credits(amount) for name, amount in sorted(self.action_nanocredits.items())
            },
        }


def parse_price_book(document: Mapping[str, object]) -> PriceBook:
    """Read a price book; InvalidPriceBookError says where it is wrong and what to do.

    {"default": rule, "rules": [rule, …], "actions": {name: credits}}, each of them optional; the
    default rule is a markup of 2.0 where none is given. A rule:

        account, tier, model     whom it is for: a uuid, a tier's name, a pattern (`*`, `?`, `[]`);
                                 at least one in `rules`, none in `default`
        kind: "markup"           factor: "2.0", of at least 1 unless allow_loss
        kind: "flat"             credits: "5"
        kind: "per_token"        credits: {"input": "1", "output": "4.5", …} per 1000 tokens,
                                 multiplier: "3.0" (1)
        minimum                  credits a request costs at least ("0")
        allow_loss               true: may sell below the provider's cost (false)
        byok_fee_percent         what is taken of the cost of a request on the customer's own
                                 provider key ("0")
    """
    book = _Section("price book", document)
    default = _rule(_Section("default", book.get("default", {"kind": "markup", "factor": "2.0"})))
    if any((default.account, default.tier, default.model)):
        raise InvalidPriceBookError("default", "the default is for everything: take out selectors")
    value = book.get("rules", [])
    if not isinstance(value, list | tuple):
        raise InvalidPriceBookError("rules", "must be a list of rules")
    entries = cast("Sequence[object]", value)
    if len(entries) > _MAX_RULES:
        raise InvalidPriceBookError("rules", f"at most {_MAX_RULES} rules; use model patterns")
    rules = tuple(_rule(_Section(f"rules[{index}]", entry)) for index, entry in enumerate(entries))
    _check_selectors(rules)
    actions = _Section("actions", book.get("actions", {}))
    prices = {name: actions.amount(name, NANOCREDITS_PER_CREDIT) for name in actions.members}
    for name in prices:
        if not _ACTION_NAME.fullmatch(name):
            raise InvalidPriceBookError(
                "actions", f"{name[:64]!r}: use lower-case letters, digits and _ . : -"
            )
    book.close("default", "rules", "actions")
    return PriceBook(default, rules, MappingProxyType(prices))


@dataclass(frozen=True, slots=True)
class _Section:
    """An object of the document, read member by member, with errors that say where."""

    path: str
    value: object

    @property
    def members(self) -> Mapping[str, object]:
        value = self.value
        if not isinstance(value, Mapping):
            raise InvalidPriceBookError(self.path, "must be an object")
        members = cast("Mapping[object, object]", value)
        if not all(isinstance(name, str) for name in members):
            raise InvalidPriceBookError(self.path, "names must be strings: put them in quotes")
        return cast("Mapping[str, object]", members)

    def get(self, name: str, default: object = None) -> object:
        """Return a member; one that is null counts as left out."""
        value = self.members.get(name)
        return default if value is None else value

    def close(self, *known: str) -> None:
        """Refuse members that nobody reads: a misspelt price must not be silently ignored."""
        unknown = sorted(set(self.members) - set(known))
        if unknown:
            raise InvalidPriceBookError(
                self.path,
                f"unknown member {unknown[0][:64]!r}; known are {', '.join(known)}",
            )

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        # Control characters and lone surrogates can't be stored, let alone be asked for.
        if isinstance(value, str) and 0 < len(value) <= _MAX_NAME_LENGTH and value.isprintable():
            return value
        raise InvalidPriceBookError(
            f"{self.path}.{name}", f"must be a text of 1 to {_MAX_NAME_LENGTH} characters"
        )

    def flag(self, name: str) -> bool:
        value = self.get(name, default=False)
        if isinstance(value, bool):
            return value
        raise InvalidPriceBookError(f"{self.path}.{name}", "must be true or false")

    def amount(
        self,
        name: str,
        factor: int,
        *,
        default: str | None = None,
        limit: int = _MAX_CREDITS,
    ) -> int:
        """Return a decimal member x factor as an exact integer of at most limit x factor."""
        path = f"{self.path}.{name}"
        value = self.get(name, default)
        if value is None:
            raise InvalidPriceBookError(path, 'is missing: give a decimal string such as "1.5"')
        if isinstance(value, float):
            raise InvalidPriceBookError(path, f'write it as a string: "{value!r}"')
        try:
            amount = scale_exactly(value, factor)
        except InvalidAmountError as error:
            raise InvalidPriceBookError(path, str(error)) from error
        if amount > limit * factor:
            raise InvalidPriceBookError(path, f"is above the limit of {limit}")
        return amount


def _rule(section: _Section) -> Rule:
    allow_loss = section.flag("allow_loss")
    terms, members = _terms(section, allow_loss=allow_loss)
    section.close(*_SELECTORS, *_RULE_FIELDS, *members)
    return Rule(
        name=section.path,
        terms=terms,
        account=_account(section),
        tier=section.text("tier"),
        model=section.text("model"),
        minimum_nanocredits=section.amount("minimum", NANOCREDITS_PER_CREDIT, default="0"),
        allow_loss=allow_loss,
        byok_fee_ppm=section.amount(
            "byok_fee_percent", _PPM_PER_PERCENT, default="0", limit=_MAX_PERCENT
        ),
    )


def _terms(
    section: _Section, *, allow_loss: bool
) -> tuple[Markup | Flat | PerToken, tuple[str, ...]]:
    """Return the terms of a rule, and the members that its kind has."""
    match section.get("kind"):
        case "markup":
            factor_ppm = section.amount("factor", PPM, limit=_MAX_FACTOR)
            if factor_ppm < PPM and not allow_loss:
                raise InvalidPriceBookError(
                    f"{section.path}.factor",
                    'sells below cost: raise it to at least "1", or set "allow_loss": true',
                )
            return Markup(factor_ppm), ("factor",)
        case "flat":
            return Flat(section.amount("credits", NANOCREDITS_PER_CREDIT)), ("credits",)
        case "per_token":
            return _per_token(section), ("credits", "multiplier")
        case _:
            raise InvalidPriceBookError(
                f"{section.path}.kind", 'must be "markup", "flat" or "per_token"'
            )


def _per_token(section: _Section) -> PerToken:
    prices = _Section(f"{section.path}.credits", section.get("credits", {}))
    prices.close(*TokenClass)
    # Both wholes must be priced, "0" if that is meant: nothing is free by omission.
    named = {TokenClass.INPUT, TokenClass.OUTPUT} | {TokenClass(name) for name in prices.members}
    nanocredits = {
        token_class: prices.amount(token_class, NANOCREDITS_PER_CREDIT)
        for token_class in TokenClass
        if token_class in named
    }
    multiplier_ppm = section.amount("multiplier", PPM, default="1", limit=_MAX_FACTOR)
    return PerToken(MappingProxyType(nanocredits), multiplier_ppm)


def _account(section: _Section) -> str | None:
    text = section.text("account")
    try:
        return None if text is None else str(UUID(text))
    except ValueError as error:
        raise InvalidPriceBookError(
            f"{section.path}.account", "must be the account's id, a uuid"
        ) from error


def _check_selectors(rules: tuple[Rule, ...]) -> None:
    seen: dict[tuple[str | None, str | None, str | None], str] = {}
    for rule in rules:
        selectors = (rule.account, rule.tier, rule.model)
        if not any(selectors):
            raise InvalidPriceBookError(
                rule.name,
                f"needs one of {', '.join(_SELECTORS)}; what is for all goes to default",
            )
        if selectors in seen:
            raise InvalidPriceBookError(
                rule.name,
                f"is for the same requests as {seen[selectors]}: remove one of them",
            )
        seen[selectors] = rule.name


def is_pattern(model: str) -> bool:
    """Whether a rule's `model` may be for more than one."""
    return _WILDCARD.search(model) is not None


def _specificity(rule: Rule) -> tuple[bool, bool, int, int]:
    literal = _WILDCARD.sub("", rule.model or "")
    is_exact = literal == rule.model
    return (
        rule.account is not None,
        rule.tier is not None,
        # A pattern goes before no pattern at all, even one without a literal character.
        0 if rule.model is None else 1 + is_exact,
        len(literal),
    )


def _pattern(rule: Rule) -> re.Pattern[str] | None:
    # As fnmatchcase does it, whose own cache is too small for a book of many patterns.
    return None if rule.model is None else re.compile(translate(rule.model))


def rule_document(rule: Rule) -> dict[str, object]:
    """Return the JSON-able document of a rule, which its name is not in."""
    document: dict[str, object] = {
        name: value
        for name, value in (
            ("account", rule.account),
            ("tier", rule.tier),
            ("model", rule.model),
        )
        if value is not None
    }
    document["kind"] = rule.kind
    terms = rule.terms
    if isinstance(terms, Markup):
        document["factor"] = decimal_text(terms.factor_ppm, 6)
    elif isinstance(terms, Flat):
        document["credits"] = _credits(terms.nanocredits)
    else:
        document["credits"] = {
            token_class.value: _credits(amount)
            for token_class, amount in terms.nanocredits_per_1000.items()
        }
        document["multiplier"] = decimal_text(terms.multiplier_ppm, 6)
    document["minimum"] = _credits(rule.minimum_nanocredits)
    document["allow_loss"] = rule.allow_loss
    document["byok_fee_percent"] = decimal_text(rule.byok_fee_ppm, 4)
    return document


def _credits(nanocredits: int) -> str:
    return decimal_text(nanocredits, 9)

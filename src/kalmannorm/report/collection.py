"""Everything that the records of a results folder give: each card, in each setting that it was run in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kalmannorm.errors import UserError
from kalmannorm.report import cost, table, variants
from kalmannorm.report.read import Records
from kalmannorm.report.render import Sheet
from kalmannorm.report.table import Table
from kalmannorm.report.variants import Variant

# All tables and figures of the papers that are to be rerun, in the papers' order; the other cards are ours.
PAPERS = (
    *(f"table{number}" for number in range(1, 9)),
    *(f"figure{number}" for number in range(3, 6)),
    *(f"v1-figure{number}" for number in range(3, 9)),
    "v1-table3",
    "talk-resnet50",
)
Files = dict[str, bytes]
SETTLED = ("parameters", "speed")  # kinds of card that show the same whatever was run


@dataclass(frozen=True)
class Made:
    """What a card gives in one setting: its table, or its pictures; `problem` says why there is none."""

    variant: Variant | None
    table: Table | None
    sheet: Sheet | None  # a table that is not of accuracies
    files: Files
    cost: str
    command: str
    problem: str = ""


@dataclass(frozen=True)
class Entry:
    """A card with everything made of it; without a card where there is none yet, or where it cannot be composed."""

    name: str
    card: Mapping[str, Any] | None
    made: tuple[Made, ...]
    problem: str = ""

    @property
    def title(self) -> str:
        """What it reproduces."""
        return str(self.card["title"]) if self.card else self.name

    @property
    def run(self) -> bool:
        """Whether anything of it was run."""
        return any(made.files for made in self.made)


def load_cards() -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """All cards with their rows composed, by name; and why the others cannot be composed."""
    from kalmannorm.experiments.cards import load, names

    cards, problems = {}, dict.fromkeys(PAPERS, "no card yet")
    for name in names():
        problems.pop(name, None)
        try:
            cards[name] = load(name, ["device=cpu", "seeds=1"]).card
        except UserError as error:
            problems[name] = f"cannot be composed here: {error}"
        else:
            cards[name]["command"] = f"kalmannorm sweep {name}"
    return cards, problems


def collect(cards: Mapping[str, Mapping[str, Any]], problems: Mapping[str, str], records: Records) -> list[Entry]:
    """All entries: the papers' in their order, then ours."""
    ours = sorted((cards.keys() | problems.keys()) - set(PAPERS))
    named = variants.named_archs(cards)
    found = []
    for name in (*PAPERS, *ours):
        if name in cards and (other := cards[name].get("same_as")):
            found.append(Entry(name, cards[name], (), f"the same picture as {other}'s, of the same runs"))
        elif name in cards:
            found.append(Entry(name, cards[name], tuple(_made(cards[name], records, named))))
        else:
            found.append(Entry(name, None, (), problems[name]))
    return found


def _made(card: Mapping[str, Any], records: Records, named: frozenset[str]) -> list[Made]:
    if card.get("kind") in SETTLED:
        return [_in_setting(dict(card), None, records)]
    found = [
        _in_setting(variants.apply(card, variant), variant, records)
        for variant in variants.of_card(card, records, named)
    ]
    return found or [_in_setting(dict(card), None, records)]


def _in_setting(card: Mapping[str, Any], variant: Variant | None, records: Records) -> Made:
    from kalmannorm.report import make

    shown, problem = None, ""
    files: Files = {}
    try:
        shown, files = make(card, records)
    except UserError as error:
        problem = str(error)
    made = shown if isinstance(shown, Table) else None
    sheet = shown if isinstance(shown, Sheet) else None
    files = {} if made and made.empty else files
    return Made(variant, made, sheet, files, cost.describe(card, records), table.command(card), problem)

"""`paretune golden`: rewards and the advantages that published rules make of them, and anybody's function compared with them."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import typer

from paretune.cli.common import Json, app, examples, print_json, say, show_table, tell
from paretune.errors import ConfigError
from paretune.report.tables import Column, Table

__all__ = ["golden"]


@app.command(
    **examples(
        "paretune golden",
        "paretune golden gdpo --case published-pair",
        "paretune golden check mine.py",
        "paretune golden check mytrainer.advantages:compute --rule gdpo",
    )
)
def golden(
    what: Annotated[str | None, typer.Argument(help="A rule, whose vectors are shown, or `check`. Left out: all rules.")] = None,
    target: Annotated[
        str | None, typer.Argument(help="Of check: FILE or MODULE with functions named like rules, or FILE:FUNCTION.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Of check: the rule that it is checked against; may be repeated.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Of check: the largest difference that counts as equal.")] = 1e-6,
    as_json: Json = False,
) -> None:
    """Golden data of multi-reward RL: rewards and each rule's advantages; check your own function f(rewards, group, weights)."""
    from paretune.testing.golden import check_known
    from paretune.testing.golden import golden as read

    data = read()
    check_known(cases=case or [])
    if what == "check":
        _check(target, rule or [], case or [], tolerance, as_json=as_json)
        return
    if target is not None or rule:
        raise ConfigError("a target and --rule go with check", found=target or f"--rule {rule}", remedy="paretune golden check TARGET")
    check_known([what] if what is not None else [], words=["check"])
    cases = [one for one in data["cases"] if not case or one["name"] in case]
    if as_json:
        print_json({**data, "cases": cases} if what is None else _of_rule(data["rules"][what], what, cases))
    elif what is None:
        columns = tuple(
            Column(key, title, "text") for key, title in (("name", "rule"), ("provenance", "provenance"), ("formula", "formula"))
        )
        rows = [
            {"name": n, **r, "provenance": r["provenance"] + " (experimental)" * ("experimental" in r)} for n, r in data["rules"].items()
        ]
        show_table(Table("rules", columns, rows))
        show_table(Table("cases", (Column("name", "case", "text"), Column("why", "why", "text")), cases))
    else:
        _show(what, data["rules"][what], cases)


def _of_rule(rule: dict[str, Any], name: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rule": name, **rule, "cases": [{**one, "expected": one["expected"][name]} for one in cases]}


def _show(name: str, rule: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    tell(f"{name}: {rule['formula']}\n{rule['source']}")
    for one in cases:
        expected = one["expected"][name]
        tell(f"\n{one['name']} ({expected['provenance']}; groups of {one['group']}, weights {one['weights']})\n{one['why']}")
        for rewards, advantage in zip(one["rewards"], expected["advantages"], strict=True):
            tell(f"  {advantage:12.6f}   {rewards}")


def _check(target: str | None, rules: list[str], cases: list[str], tolerance: float, *, as_json: bool) -> None:
    """Exit 1 where a vector differs."""
    from paretune.testing.golden import check_golden, functions_of

    if target is None:
        raise ConfigError("check is given what to check", found="no target", remedy="paretune golden check FILE.py")
    functions = functions_of(target, rules)
    found = [d for rule, function in functions.items() for d in check_golden(function, rule, cases=cases, tolerance=tolerance)]
    if as_json:
        rows = [{**dataclasses.asdict(d), "largest": d.largest if math.isfinite(d.largest) else None} for d in found]
        plain = [{**row, "got": [g if math.isfinite(g) else None for g in row["got"]]} for row in rows]
        print_json({"rules": list(functions), "tolerance": tolerance, "different": plain})
    else:
        for d in found:
            tell(f"{d.rule} {d.case}: {d.error or f'differs by up to {d.largest:g}'}\n    {d.why}")
            if not d.error:
                tell(f"    expected {[round(v, 6) for v in d.expected]}\n    got      {[round(v, 6) for v in d.got]}")
        say(f"{', '.join(functions)}: {len(found)} vectors differ by more than {tolerance:g}")
    if found:
        raise typer.Exit(1)

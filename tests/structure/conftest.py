"""The zoo's report: what could be removed of each architecture, and how equal the rest is."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    rows = [v for r in reports for k, v in getattr(r, "user_properties", []) if k == "zoo"]
    if not rows:
        return
    terminalreporter.section("zoo: half of the channels of every group removed")
    terminalreporter.write_line(
        f"{'architecture':36} {'groups':>6} {'removed':>8}  {'verdict':8} {'from masked':>11} "
        f"{'from reference':>14} {'CPU s':>6}"
    )
    for row in sorted(rows, key=lambda r: r["architecture"]):
        reference = "" if row["reference"] is None else f"{row['reference']:.1e}"
        terminalreporter.write_line(
            f"{row['architecture']:36} {row['groups']:6} {row['removed']:8.1%}  "
            f"{row['verdict']:8} {row['masked']:11.1e} {reference:>14} {row['seconds']:6.1f}"
            f"  {row['below']}"
        )

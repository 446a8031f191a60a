"""The HTML of a report: one page with its style inside, light or dark, wide or narrow."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def page(title: str, sections: Iterable[str]) -> str:
    """A whole document; nothing in it runs, and nothing is loaded from elsewhere."""
    body = "\n".join(filter(None, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Should a text ever get through unescaped, the browser still runs and fetches nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A titled section, or nothing if there is nothing to say."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of plain texts; a name in the first column, values in the others."""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = [f"<tr>{''.join(f'<td>{escape(str(c))}</td>' for c in row)}</tr>" for row in rows]
    return f"<table>{top}{''.join(body)}</table>" if body else ""


def wide(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table that is moved sideways where the window is too narrow for it."""
    inner = table(rows, head)
    return f'<div class="wide">{inner}</div>' if inner else ""


def texts(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of texts that fill several lines."""
    inner = table(rows, head)
    return f'<div class="texts">{inner}</div>' if inner else ""


def commands(texts: Mapping[str, str]) -> str:
    """Commands to copy, each under its title; empty ones are left out."""
    return "".join(
        f"<p>{escape(title)}</p><pre>{escape(command)}</pre>"
        for title, command in texts.items()
        if command
    )


def shares(parts: Sequence[tuple[str, str, float]]) -> str:
    """A bar cut by the shares of (name, shown value, value), and its table; zeros are left out."""
    total = sum(value for _, _, value in parts) or 1.0
    bar, rows = "", ""
    for n, (name, shown, value) in enumerate(parts):
        if not value:
            continue
        share = value / total
        bar += f'<i class="t{n}" style="width:{share:.2%}" title="{escape(name)}"></i>'
        dot = f'<i class="dot t{n}"></i>'
        rows += f"<tr><td>{dot}{escape(name)}</td><td>{escape(shown)}</td><td>{share:.1%}</td></tr>"
    return f'<div class="bar">{bar}</div><table>{rows}</table>'


def settings(values: Mapping[str, str], defaults: Mapping[str, str]) -> str:
    """Names and values in columns; those that have a default other than their value are marked."""
    rows = []
    for name, value in values.items():
        mark = default = ""
        if name in defaults:
            mark = ' class="changed"'
            default = f"<small>default {escape(defaults[name])}</small>"
        rows.append(f"<tr{mark}><td>{escape(name)}</td><td>{escape(value)}{default}</td></tr>")
    return f'<div class="settings"><table>{"".join(rows)}</table></div>' if rows else ""


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2430; --soft: #667085; --line: #e4e7ec;
  --mark: #fff4d6; --good: #067647; --bad: #b42318;
  --c0: #2f6fde; --c1: #e0701b; --c2: #12936a; --c3: #8a4fd0; --c4: #c93a6c; --c5: #57707f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --text: #e4e8ee; --soft: #97a3b4; --line: #2d3643;
    --mark: #3d3415; --good: #4cc38a; --bad: #ff8a7a;
    --c0: #6ba0ff; --c1: #ff9d52; --c2: #3ecb97; --c3: #bb8cf7; --c4: #f57ba4; --c5: #9db3c0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 14px 0 4px; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 18px;
}
small, .soft { color: var(--soft); font-size: 13px; }
.verdict { margin: 0; font-size: 16px; }
.verdict.done::before { content: "✓ "; color: var(--good); }
.verdict.failed::before { content: "✗ "; color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: 4px 0 4px 14px; border-top: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child { padding-left: 0; text-align: left; }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; color: var(--soft); font-size: 13px; }
.texts td, .texts th { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.texts td:not(:first-child) { min-width: 12ch; width: 22%; }
.wide { overflow-x: auto; }
.wide td, .wide th { white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.grid { gap: 20px 36px; align-items: start; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 14px; align-items: baseline; }
figcaption b { font-weight: 600; font-size: 14px; }
.keys { margin-left: auto; font-size: 13px; color: var(--soft); }
.keys i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; }
.keys i { margin: 0 5px 3px 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--line); }
svg .axis { stroke: var(--soft); }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg text.name { fill: var(--text); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg text.bad { fill: var(--bad); font-size: 14px; font-weight: 700; }
.bar { display: flex; height: 14px; border-radius: 7px; overflow: hidden; margin-bottom: 10px; }
.bar i { display: block; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
.t0 { background: var(--c2); } .t1 { background: var(--c0); } .t2 { background: var(--c3); }
.t3 { background: var(--c5); } .t4 { background: var(--c1); } .t5 { background: #4fb3c9; }
.t6 { background: #b3a13c; } .t7 { background: var(--bad); }
pre {
  margin: 4px 0 14px; padding: 9px 12px; border-radius: 7px; background: var(--page);
  border: 1px solid var(--line); overflow-x: auto;
}
pre, .settings { font: 13px/1.5 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
section > p { margin: 0 0 4px; }
.settings td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.settings { columns: 2 420px; column-gap: 40px; margin-top: 10px; }
.settings td:first-child { white-space: nowrap; width: 1%; }
.settings td:last-child { padding-left: 20px; }
.settings tr:first-child td { border-top: 1px solid var(--line); }
.settings small { margin-left: 12px; white-space: nowrap; }
.changed td { background: var(--mark); }
.changed td:first-child { box-shadow: -6px 0 0 var(--mark); }
.changed td:last-child { box-shadow: 6px 0 0 var(--mark); }
@media (max-width: 560px) {
  main { padding: 18px 10px 40px; }
  section { padding: 14px; }
  .settings tr { display: flex; flex-wrap: wrap; border-top: 1px solid var(--line); }
  .settings tr td:first-child, .settings tr td { width: auto; border: 0 !important; }
  tr.changed { background: var(--mark); }
}
"""

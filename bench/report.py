"""Tables from the results of runs: for a terminal, for README.md between its markers, and for a page of their own.

In README.md a table of bench/cases.py on a data set stands between <!-- bench:TABLE DATA --> and <!-- /bench -->.
The page is one file: tables, the last samples of each case, and curves, drawn as SVG; it asks nothing of any other.
"""

import base64
import html
import json
import math
import re
import statistics
import sys
from pathlib import Path

import gan
from bench import speed
from bench.cases import COLUMNS, TABLES, same

MARKERS = re.compile(r"(<!-- bench:(\S+) (\S+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
FEW = 2048  # images, below which FID says little


# -- results ---------------------------------------------------------------------------------------------------------


def read_json(path):
    """What a JSON file holds, or None if there is none."""
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else None
    except ValueError as error:
        sys.exit(f"bench: {path} is damaged: delete it ({error})")


def read_results(folder):
    """The results in a folder, of runs and of speed, by name."""
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    runs = [result for result in found if isinstance(result, dict) and "case" in result]
    return runs, [result for result in found if isinstance(result, dict) and result.get("measure") == "speed"]


def value(result, column):
    """What a run has for a column, or None."""
    if column in result["metrics"]:
        return result["metrics"][column]["value"]
    if column == "minutes":
        return result["seconds"] / 60
    if column == "peak_mib":
        return result["peak_memory"] and result["peak_memory"] / 2**20
    return result.get(column)


def used(name, data, results):
    """What a table on a data set rests on: {label of a row: [result of a seed]}."""
    wanted = {label: (same(case, data), Path(data).resolve().name) for label, case, _ in TABLES[name].rows}
    return {label: [r for r in results if (r["case"], r["data"]) == pair] for label, pair in wanted.items()}


# -- as text ---------------------------------------------------------------------------------------------------------


def spread(values, form):
    """The mean of numbers and, of several, their standard deviation (over N - 1), as text; nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def fill(name, data, results):
    """A table on a data set as lists of texts: a head, and rows, real images first.

    What we measured has the paper's number beside it if the paper has that column; what nobody measured is left out.
    """
    table, found = TABLES[name], used(name, data, results)
    every = [result for row in found.values() for result in row]
    printed = [dict(zip(table.columns, paper)) for paper in (table.real, *(paper for _, _, paper in table.rows))]
    head, rows = [""], [["real images"], *([label] for label in found)]
    for column in table.columns:
        heading, form = COLUMNS[column]
        values = [[value(result, column) for result in row] for row in found.values()]
        values = [[number for number in row if number is not None] for row in values]
        if not any(values):
            continue
        reals = [result["metrics"].get(column, {}).get("real") for result in every]
        reals = [real for real in reals if real is not None]
        ours = [f"{statistics.fmean(reals):{form}}" if reals else "", *(spread(row, form) for row in values)]
        paper = [row.get(column, "") for row in printed]
        head += [table.headings.get(column, heading)] + ["paper"] * any(paper)
        for row, own, theirs in zip(rows, ours, paper):
            row += [own] + [theirs] * any(paper)
    for row, count in zip((head, *rows), ("seeds", "", *map(len, found.values()))):
        row.append(str(count or ""))
    return head, rows if any(rows[0][1:]) else rows[1:]


def span(numbers):
    """From the least to the largest, as text."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def notes(name, data, results):
    """What one must know of a table, in sentences: data, updates, images and features that judged, device; warnings."""
    table, every = TABLES[name], [result for row in used(name, data, results).values() for result in row]
    metrics = [result["metrics"][column] for result in every for column in table.columns if column in result["metrics"]]
    sizes, seeds = {result["settings"]["size"] for result in every}, {result["seed"] for result in every}
    said = [f"{Path(data).resolve().name}, {span(sizes)} pixels, {span([r['steps'] for r in every])} updates"]
    features = sorted({metric["features"] for metric in metrics})
    said.append(f"judged on {span([metric['n_samples'] for metric in metrics])} images: {', '.join(features)}")
    if len(seeds) > 1:
        said.append("mean ± standard deviation over seeds")
    said.append(", ".join(sorted({f"{r['device_name']}, torch {r['versions']['torch']}" for r in every})))
    commits = {f"{r['commit'][:7]}{'' if r['clean'] else ' with changes'}" for r in every if r.get("commit")}
    said += [f"code of {', '.join(sorted(commits))}"] if commits else []
    if table.source and any(paper for _, _, paper in table.rows):
        said.append(f"paper: {table.source}")
    fids = [result["metrics"]["fid"] for result in every if "fid" in table.columns and "fid" in result["metrics"]]
    if few := [metric["n_samples"] for metric in fids if min(metric["n_samples"], metric["n_real"]) < FEW]:
        said.append(f"FID rests on {span(few)} images, fewer than {FEW:,}, and is too high for it: read KID first")
    return said


def markdown(name, data, results):
    """A table under its title, its columns aligned, with its notes."""
    head, rows = fill(name, data, results)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        [text.ljust(w) if not i else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths))]
        for row in (head, *rows)
    ]
    lines.insert(1, [("-" * w if not i else "-" * (w - 1) + ":") for i, w in enumerate(widths)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{TABLES[name].title}**\n\n{text}\n\n*{'; '.join(notes(name, data, results))}.*\n"


def summary(metrics):
    """The metrics that have columns, in a line, by their names in results."""
    return ", ".join(f"{name} {m['value']:{COLUMNS[name][1]}}" for name, m in metrics.items() if name in COLUMNS)


def fill_readme(text, results):
    """A README with a table of `results` between every pair of markers; what stood there goes."""

    def table(found):
        opening, name, data, _, closing = found.groups()
        if name not in TABLES or not any(used(name, data, results).values()):
            known = "no table" if name not in TABLES else f"no table that has results on {data}"
            sys.exit(f"bench: the README has a marker for {name} {data}: that is {known}")
        return f"{opening}{markdown(name, data, results)}{closing}"

    if len(MARKERS.findall(text)) != text.count("<!-- bench:"):
        sys.exit("bench: the README has a marker like <!-- bench:losses toy --> without its <!-- /bench --> line")
    return MARKERS.sub(table, text)


# -- as a page -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --rule: #d9dee3; --paper: #fff; --card: #f5f7f9;
  --c0: #0b62a8; --c1: #c8500a; --c2: #0a7d58; --c3: #a8418a; --c4: #8a6a00; --c5: #2b8fc4; --c6: #6b5bd2; --c7: #777; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --rule: #343c45; --paper: #14181c;
  --card: #1d2328; --c0: #6bb3ee; --c1: #f2935c; --c2: #4fc79c; --c3: #dd8fc6; --c4: #d9b84a; --c5: #7fd0f5;
  --c6: #b0a5f5; --c7: #aaa; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
section { border-top: 1px solid var(--rule); margin-top: 2rem; padding-top: 1.25rem; }
nav a { display: inline-block; margin: 0 1rem .25rem 0; } a { color: var(--c0); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; } th:first-child { text-align: left; } tr > .paper { color: var(--soft); }
.notes, figcaption, .legend { color: var(--soft); font-size: .85rem; }
.cards { display: grid; align-items: start; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; }
figure b { color: var(--ink); } img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg line { stroke: var(--rule); } polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend span { margin-right: .9rem; white-space: nowrap; } .legend span::before { content: ""; display: inline-block;
  width: .9rem; height: .2rem; margin-right: .35rem; vertical-align: middle; background: var(--c); }
"""


def ticks(low, high, count=4):
    """At most `count` + 1 round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, lines, wide=480, high=230):
    """Lines {label: [(x, y)]} over a number of updates, as an SVG with a legend; '' if no line has two points."""
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    xs, ys = zip(*(point for points in lines.values() for point in points))
    low, top = min(ys), max(ys) if max(ys) > min(ys) else min(ys) + 1
    left, right, upper, lower = 50, wide - 8, 10, high - 24

    def place(x, y):
        return left + (right - left) * x / max(xs), lower - (lower - upper) * (y - low) / (top - low)

    parts = []
    for y in ticks(low, top):
        at = place(0, y)[1]
        parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(0, max(xs)):
        at = place(x, low)[0]
        parts.append(f'<text x="{min(at, right - 14):.1f}" y="{high - 6}" text-anchor="middle">{x:,.0f}</text>')
    for i, points in enumerate(lines.values()):
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        parts.append(f'<polyline points="{path}" style="stroke: var(--c{i % 8})"/>')
    keys = "".join(f'<span style="--c: var(--c{i % 8})">{html.escape(label)}</span>' for i, label in enumerate(lines))
    drawn = f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    return f'<div><figcaption>{html.escape(title)}</figcaption>{drawn}<div class="legend">{keys}</div></div>'


def rows_of(head, rows):
    """A table in HTML."""
    kinds = ["paper" if text == "paper" else "" for text in head]

    def cells(row, tag):
        kind = [f' class="{name}"' if name else "" for name in kinds]
        return "".join(
            f"<{tag if i else 'th'}{name}>{html.escape(text)}</{tag if i else 'th'}>"
            for i, (name, text) in enumerate(zip(kind, row))
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def card(label, result, folder):
    """The last samples of a run, what it got, and its losses."""
    sheet, text = folder / f"{result['case']}-{result['data']}-{result['seed']}.png", html.escape(label)
    picture = ""
    if sheet.exists():
        code = base64.b64encode(sheet.read_bytes()).decode()
        picture = f'<img alt="samples of {text}" src="data:image/png;base64,{code}">'
    losses = {}
    for row in result["log"]:
        for name, number in row.items():
            if name not in ("step", "epoch", "images_per_s"):
                losses.setdefault(name, []).append((row["step"], number))
    flags = html.escape(" ".join([result["script"], "--data", result["data"], *result["flags"]]))
    caption = f"<figcaption><b>{text}</b><br><code>{flags}</code></figcaption>"
    return f"<figure>{caption}{picture}{chart('losses over updates', losses, 320, 170)}</figure>"


def speeds(rows):
    """(step, images/s) of the rows of a log that tell of more than one update: the first after a start is slow."""
    return [(row["step"], row["images_per_s"]) for last, row in zip(rows, rows[1:]) if row["step"] - last["step"] > 1]


def section(name, data, results, folder):
    """A table with its notes, curves of quality and speed, and a card for each row that was measured."""
    first = {label: row[0] for label, row in used(name, data, results).items() if row}
    column = next(column for column in TABLES[name].columns if any(column in r["metrics"] for r in first.values()))
    better = {
        label: [(point["step"], point[column]) for point in result["curve"] if column in point]
        for label, result in first.items()
    }
    faster = {label: speeds(result["log"]) for label, result in first.items()}
    charts = [chart(f"{COLUMNS[column][0]} over updates", better), chart("images/s over updates", faster)]
    cards = "".join(card(label, result, folder) for label, result in first.items())
    said = html.escape("; ".join(notes(name, data, results)))
    drawn = f'<div class="charts">{"".join(charts)}</div><div class="cards">{cards}</div>'
    text = f'{rows_of(*fill(name, data, results))}<p class="notes">{said}.</p>{drawn}'
    return f'<section id="{name}-{data}"><h2>{html.escape(TABLES[name].title)}</h2>{text}</section>'


def is_shown(name, data, results):
    """Whether more was measured of a table than a row that it shares with others."""
    measured = sum(map(bool, used(name, data, results).values()))
    return measured >= min(2, len(TABLES[name].rows))


def page(results, times, folder):
    """The whole page, as text."""
    sets = sorted({result["data"] for result in results}, key=lambda data: (data != "toy", data))
    found = [(name, data) for data in sets for name in TABLES if is_shown(name, data, results)]
    parts = [section(name, data, results, folder) for name, data in found]
    links = "".join(f'<a href="#{name}-{data}">{html.escape(name)}, {html.escape(data)}</a>' for name, data in found)
    for timed in times:
        rows = [[str(see(row)) for _, see in speed.COLUMNS.values()] for row in timed["rows"]]
        said = f"{timed['device_name']}, {timed['threads']} threads, torch {timed['versions']['torch']}"
        parts.append(
            f"<section><h2>one update</h2>{rows_of([*speed.COLUMNS], rows)}"
            f'<p class="notes">{html.escape(said)}.</p></section>'
        )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>GANs, measured</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>GANs, measured</h1><nav>{links}</nav>{''.join(parts)}</body></html>\n"
    )


# -- the command -----------------------------------------------------------------------------------------------------


def options(parser):
    """What it takes."""
    published = Path("bench", "results")
    parser.add_argument("--results", type=Path, default=published, help="folder of results (bench/results)")
    parser.add_argument(
        "--readme", type=Path, help="file with markers to fill (README.md for bench/results, else none)"
    )
    parser.add_argument("--to", type=Path, default=Path("runs", "report.html"), help="the page")


def run(args):
    """Fill the markers of --readme, and write the page."""
    results, times = read_results(args.results)
    if not results and not times:
        sys.exit(f"bench: --results {args.results} holds no results: `python -m bench` makes some")
    readme = args.readme or (Path("README.md") if args.results == Path("bench", "results") else None)
    if readme and not readme.exists():
        sys.exit(f"bench: --readme {readme} is not there")
    texts = {args.to: page(results, times, args.results)}
    if readme:
        texts[readme] = fill_readme(readme.read_text("utf-8"), results)
    for path, text in texts.items():
        with gan.replacing(path) as file:
            file.write(text.encode())
        print(f"wrote {path}")

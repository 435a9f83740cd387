"""Tables from results: those of README.md between its markers, bench/RESULTS.md with all of them, and a page.

In README.md the table losses on toy data stands between <!-- bench:losses toy --> and <!-- /bench -->. The page is one
file, with the tables and, of the runs with the first seed, the last samples and the loss curves.
"""

import re
from pathlib import Path

from PIL import Image

from bench.columns import markdown, read_json
from bench.common import data_uri, fail, page, save
from bench.curves import curves
from bench.study import fooled
from bench.tables import TABLES, make

PUBLISHED = Path("bench", "results")
MARKERS = re.compile(r"(<!-- bench:(\S+) (\S+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
HEAD = """# Results

Written by `python -m bench report` from bench/results. "paper" is what the paper prints, of its own data. Several
seeds: mean ± standard deviation; one: value ± standard error; KID: ± deviation over subsets. KID, FID, missing and
uneven: lower is better. Below a table: commits of the code, hashes of the networks that judge.
"""
PEOPLE = {  # Isola et al. 2017, Table 3: the share of generated images that people took for real
    "map to photo, L1+cGAN": "18.9 ± 2.5 %",
    "map to photo, L1": "0.8 ± 0.3 %",
    "photo to map, L1+cGAN": "6.1 ± 1.3 %",
    "photo to map, L1": "2.8 ± 1.0 %",
}


def fill_readme(text, found):
    """A README with a table of results between each pair of markers; what stood there goes."""

    def fill(match):
        opening, name, data, _, closing = match.groups()
        table = make(name, data, found) if name in TABLES else ""
        return f"{opening}{table}{closing}" if table else fail(f"README.md: no results for {name} {data}")

    if len(MARKERS.findall(text)) != text.count("<!-- bench:"):
        fail("README.md has a marker like <!-- bench:losses toy --> without its <!-- /bench -->")
    return MARKERS.sub(fill, text)


def results_text(found):
    """bench/RESULTS.md, as text: the tables of which two rows were measured at least, and what people say."""
    sets = sorted({result["data"] for result in found if "case" in result}, key=lambda name: (name != "toy", name))
    parts = [make(name, data, found, least=2) for data in sets for name in TABLES]
    if studies := [result for result in found if "study" in result]:
        answers = {}
        for each in studies:
            answers.setdefault(f"{each['study']}, {each['method']}", []).extend(each["answers"])
        columns = [["", *PEOPLE, *answers], ["ours", *[""] * len(PEOPLE), *map(fooled, answers.values())]]
        columns.append(["paper", *PEOPLE.values(), *[""] * len(answers)])
        parts.append(markdown("What people take for real", columns, "paper: Isola et al. 2017, Table 3"))
    return "\n".join([HEAD, *filter(None, parts)])


def pictures(found, folder):
    """Command, last samples and loss curves of the runs with the first seed, for the page."""
    for result in (result for result in found if "case" in result and not result["seed"]):
        name = f"{result['case']}-{result['data']}-{result['seed']}"
        images = [data_uri(Image.open(path).save) for path in folder.glob(f"{name}.png")]
        command = " ".join([result["script"], "--data", result["data"], *result["flags"]])
        yield command, [*images, data_uri(curves({name: result["log"]}).savefig)]


def options(parser):
    """What it takes."""
    parser.add_argument("--results", type=Path, default=PUBLISHED, help="folder of results (%(default)s)")
    parser.add_argument("--to", type=Path, default="runs/report.html", help="the page (%(default)s)")


def main(args):
    """Write the page and, from the published results, the tables of README.md and bench/RESULTS.md."""
    found = [read_json(path) for path in sorted(args.results.glob("*.json"))]
    if not found:
        fail(f"--results {args.results} holds no results: `python -m bench` makes some")
    tables = results_text(found)
    texts = {args.to: page("GANs, measured", tables, pictures(found, args.results))}
    if args.results == PUBLISHED:
        texts[Path("bench", "RESULTS.md")] = tables
        texts[Path("README.md")] = fill_readme(Path("README.md").read_text("utf-8"), found)
    for path, text in texts.items():
        save(path, text)
        print(f"wrote {path}")

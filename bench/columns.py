"""How results become the text of a table.

Mean ± standard deviation (over N - 1) of several seeds, value ± standard error of one; of KID, which has none, the
deviation over subsets.
"""

import json
import statistics

FEW = 2048  # images, below which FID says little
HEADINGS = {"photo_iou": "photo IoU", "labels_iou": "labels IoU", "kid": "KID", "fid": "FID", "right": "correct"}
HEADINGS |= {"missing": "digits missing", "log_likelihood": "log-likelihood", "steps": "updates of G", "ink": "colour"}
HEADINGS |= {"images_per_s": "images/s", "peak_mib": "MiB", "kid_std": "±", "n_samples": "samples", "n_real": "real"}
FORMATS = {"kid": ".3f", "log_likelihood": ".0f", "missing": ".1f", "minutes": ".1f"}  # else two digits
FORMATS |= {"steps": ",.0f", "images_per_s": ",.0f", "peak_mib": ",.0f"}


def read_json(path):
    """What a JSON file holds, or None if there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def read_log(folder):
    """The rows of a run's log.jsonl, if it has one."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def value(result, column):
    """What a result has for a column, or None. Images per second are those of the data, over the whole run."""
    if column == "images_per_s":
        settings = result["settings"]
        return result["steps"] * settings["batch_size"] * (settings.get("k") or 1) / result["seconds"]
    if column == "minutes":
        return result["seconds"] / 60
    if column == "peak_mib":
        return result["peak_memory"] / 2**20 if result["peak_memory"] else None
    return result["steps"] if column == "steps" else result["metrics"].get(column, {}).get("value")


def spread(values, error, form):
    """The mean of `values` ± their standard deviation, or one value ± its `error`, as text; nothing of none."""
    if not values:
        return ""
    error = statistics.stdev(values) if len(values) > 1 else error
    mean = format(statistics.fmean(values), form)
    return mean if error is None else f"{mean} ± {error:{form}}"


def fill(columns, rows):
    """The columns of a table as texts, heading first. `rows` are (label, numbers of the paper, results of all seeds).

    The first row is of real images. Beside ours stands the paper's number, if the paper has that column. What nobody
    measured is left out.
    """
    table = [["", *(label for label, _, _ in rows)]]
    for place, column in enumerate(columns):
        form, ours, reals = FORMATS.get(column, ".2f"), [], []
        for _, _, results in rows:
            metrics = [result["metrics"].get(column, {}) for result in results]
            values = [number for result in results if (number := value(result, column)) is not None]
            ours.append(spread(values, metrics[0].get("error") if metrics else None, form))
            reals += [metric["real"] for metric in metrics if metric.get("real") is not None]
        if any(ours):
            ours[0] = format(statistics.fmean(reals), form) if reals else ""
            table.append([HEADINGS.get(column, column.replace("_", " ")), *ours])
            paper = [numbers[place] if place < len(numbers) else "" for _, numbers, _ in rows]
            table += [["paper", *paper]] if any(paper) else []
    return [*table, ["seeds", *(str(len(results) or "") for _, _, results in rows)]]


def markdown(title, columns, note):
    """Columns of texts, heading first, as an aligned table between a title and a note."""
    lines = []
    for texts in columns:
        width = max(map(len, texts))
        aligned = [text.rjust(width) if lines else text.ljust(width) for text in texts]
        lines.append([aligned[0], "-" * (width - 1) + (":" if lines else "-"), *aligned[1:]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in zip(*lines))
    return f"**{title}**\n\n{table}\n\n*{note}.*\n"


def span(numbers):
    """From the least to the largest, as text."""
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def notes(columns, source, results):
    """What one must know of a table: updates, what judged how many images, device, code, the paper; a warning."""
    metrics = [result["metrics"][column] for result in results for column in columns if column in result["metrics"]]
    samples, real = (span([metric[name] for metric in metrics]) for name in ("n_samples", "n_real"))
    said = [f"{span([result['steps'] for result in results])} updates of G", f"judged on {samples} images, {real} real"]
    said.append("by " + ", ".join(sorted({metric["features"] for metric in metrics})))
    said += sorted({f"{result['device_name']}, torch {result['versions']['torch']}" for result in results})
    commits = {(result["commit"] or "unknown")[:7] + " with changes" * (not result["clean"]) for result in results}
    said.append("code of " + ", ".join(sorted(commits)))
    said += [f"paper: {source}"] if source else []
    fids = [result["metrics"]["fid"] for result in results if "fid" in columns and "fid" in result["metrics"]]
    few = [metric["n_samples"] for metric in fids if min(metric["n_samples"], metric["n_real"]) < FEW]
    if few:
        said.append(f"FID rests on {span(few)} images, fewer than {FEW:,}, and is too high for it: read KID first")
    return "; ".join(said)

"""One file that shows a whole run: figures, curves, confusion, mistakes, skipped images."""

import base64
import io
import json
import math
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keras_xfer import files
from keras_xfer.extras import require
from keras_xfer.reports import history_plots, pictures, plots, tables
from keras_xfer.reports._numbers import duration
from keras_xfer.reports.predictions import read_predictions
from keras_xfer.reports.search_section import search_section
from keras_xfer.reports.trials import read_trials

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_MOST_ROWS = 200  # of a table in the page; the CSV file holds all
_THUMBNAIL_SIDE = 220


class Headline(NamedTuple):
    """One large figure at the top of the report."""

    value: str
    name: str
    note: str = ""


class Comparison(NamedTuple):
    """Several runs or stages side by side, from a dict of dicts in `metrics.json`."""

    name: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def write_report(
    run_dir: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Path:
    r"""Write `report.html`: a run at a glance, in one file that can be mailed.

    Everything is inside the page, nothing is loaded from elsewhere. It is made from what lies in
    `run_dir`: `history.csv`, and where they exist `predictions.csv`, `metrics.json`,
    `labels.json` and `skipped.csv`; what is missing leaves out its section. A hyperparameter
    search leaves `trials.csv`: its section has figures of the search, the ten best trials, and
    what the failed ones say. A search alone, without `history.csv`, makes a report too.

    Args:
        run_dir: Folder of the run.
        images: Folder that the names in `predictions.csv` are relative to, for the pictures of
            the wrong predictions. `None`: `run_dir` itself.
        title: Heading of the page. `None`: the folder's name.

    Returns:
        Path of the written `run_dir/report.html`.

    Raises:
        FileNotFoundError: There is neither `history.csv` nor `trials.csv` in `run_dir`.
        ImportError: jinja2, matplotlib or pandas is not installed.
        ValueError: One of the files is not what its name says.

    Example:
    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> _ = (run / "history.csv").write_text("epoch,loss,stage\n0,1.5,0\n1,1.2,1\n")
    >>> write_report(run).name
    'report.html'
    """
    run = Path(run_dir)
    search = read_trials(run / "trials.csv") if (run / "trials.csv").is_file() else None
    if search is None and not (run / "history.csv").is_file():
        raise FileNotFoundError(
            "Expected the folder of a run, with a history.csv, or a trials.csv of a search. "
            f"Received: run_dir={str(run)!r}. Give the folder that keras-xfer "
            "train, tune or demo wrote."
        )
    # A search in which no trial has completed leaves no history.
    pd = require("pandas")
    history = pd.DataFrame()
    if (run / "history.csv").is_file():
        history = _read_csv(run / "history.csv")
    skipped = None
    if (run / "skipped.csv").is_file():
        skipped = _read_csv(run / "skipped.csv", text=True)
    metrics = _read_json(run / "metrics.json", dict)
    class_names = _read_json(run / "labels.json", list)
    predictions = scores = None
    if (run / "predictions.csv").is_file():
        predictions = read_predictions(run / "predictions.csv")
        scores = tables.classification_table(predictions, class_names)

    page: dict[str, Any] = {
        "title": title or run.resolve().name,
        "headlines": _headlines(history, predictions, class_names, skipped),
        "figures": {
            **_history_figures(history, _stage_names(metrics or {}, history)),
            **_prediction_figures(predictions, scores, class_names),
        },
        "search": None if search is None else _search(search),
        "scores": None,
        "confused": [],
        "mistakes": [],
        "wrong": 0,
        "many_classes": False,
        "metrics": _flat(metrics or {}),
        "comparisons": _comparisons(metrics or {}),
        "skipped": [] if skipped is None else skipped.head(_MOST_ROWS).values.tolist(),
        "skipped_count": 0 if skipped is None else len(skipped),
    }
    if predictions is not None and scores is not None:
        root = run if images is None else Path(images)
        page["scores"] = [_score_row(name, row) for name, row in scores.iterrows()]
        page["many_classes"] = len(scores) - 2 > 20
        page["confused"] = _confused(predictions)
        page["mistakes"] = [
            _mistake(row, root) for _, row in tables.most_wrong(predictions, 12).iterrows()
        ]
        page["wrong"] = int((~predictions["correct"]).sum())
    target = run / "report.html"
    files.write_text(target, _template().render(page))
    return target


def _template() -> Any:
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # class names and file names come from whoever named the folders
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html")


def _read_csv(path: Path, *, text: bool = False) -> "pd.DataFrame":
    pd = require("pandas")
    kwargs: dict[str, Any] = {"dtype": str, "keep_default_na": False} if text else {}
    try:
        return pd.read_csv(path, encoding="utf-8", **kwargs)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, kind):
        raise ValueError(
            f"Expected a JSON {kind.__name__} in {path.name}. Received: {type(value).__name__} in "
            f"{str(path)!r}"
        )
    return value


# The page's parts.


def _headlines(
    history: "pd.DataFrame",
    predictions: "pd.DataFrame | None",
    class_names: list[str] | None,
    skipped: "pd.DataFrame | None",
) -> list[Headline]:
    headlines = []
    if predictions is not None and len(predictions):
        right, total = int(predictions["correct"].sum()), len(predictions)
        low, high = _interval(right, total)
        headlines.append(
            Headline(
                f"{right / total:.1%}",
                "accuracy",
                f"{right:,} of {total:,} images; 95% interval {low:.1%} to {high:.1%}",
            )
        )
    best = _best(history, "val_accuracy")
    if best is not None:
        value, epoch = best
        headlines.append(Headline(f"{value:.1%}", "best validation accuracy", f"in epoch {epoch}"))
    if "epoch_seconds" in history and history["epoch_seconds"].notna().any():
        seconds = history["epoch_seconds"]
        headlines.append(
            Headline(
                duration(float(seconds.sum())),
                "training time",
                f"{len(history)} epochs, {duration(float(seconds.median()))} an epoch (median)",
            )
        )
    elif len(history):
        headlines.append(Headline(str(len(history)), "epochs"))
    if class_names:
        headlines.append(Headline(f"{len(class_names):,}", "classes"))
    if skipped is not None:
        note = "listed below" if len(skipped) else ""
        headlines.append(Headline(f"{len(skipped):,}", "images skipped", note))
    return headlines


def _stage_names(metrics: dict[str, Any], history: "pd.DataFrame") -> list[str] | None:
    """Names of the stages, which `keras-xfer train` notes in their order."""
    stages = metrics.get("stages")
    if isinstance(stages, dict) and "stage" in history and history["stage"].max() < len(stages):
        return list(stages)
    return None


def _history_figures(
    history: "pd.DataFrame", stage_names: list[str] | None
) -> dict[str, str | None]:
    curves = timing = None
    if len(history):
        curves = _svg(history_plots.plot_history(history, stage_names=stage_names))
        if "epoch_seconds" in history and history["epoch_seconds"].notna().any():
            timing = _svg(history_plots.plot_timing(history, stage_names=stage_names))
    return {"history": curves, "timing": timing}


def _prediction_figures(
    predictions: "pd.DataFrame | None",
    scores: "pd.DataFrame | None",
    class_names: list[str] | None,
) -> dict[str, str | None]:
    confusion = class_scores = None
    if predictions is not None and scores is not None and len(predictions):
        confusion = _svg(plots.plot_confusion(tables.confusion_table(predictions, class_names)))
        class_scores = _svg(plots.plot_class_scores(scores))
    return {"confusion": confusion, "class_scores": class_scores}


def _search(trials: "pd.DataFrame") -> dict[str, Any]:
    section = search_section(trials)
    drawings = {name: figure and _svg(figure) for name, figure in section["figures"].items()}
    return {**section, "figures": drawings}


def _svg(figure: "Figure") -> str:
    """Encode a figure as a data URI."""
    matplotlib = require("matplotlib")
    buffer = io.BytesIO()
    # Text stays text: the reader's browser has the letters that matplotlib's own font lacks.
    # The salt makes the ids in the drawing, and so the page, the same each time.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "keras-xfer"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _uri("image/svg+xml", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _score_row(name: Any, row: "pd.Series[Any]") -> dict[str, Any]:
    return {
        "name": name,
        "precision": f"{row['precision']:.3f}",
        "recall": f"{row['recall']:.3f}",
        "f1": f"{row['f1-score']:.3f}",
        "support": f"{int(row['support']):,}",
    }


def _confused(predictions: "pd.DataFrame", n: int = 10) -> list[tuple[str, str, int]]:
    """List the pairs of classes that are taken for each other most often."""
    wrong = predictions[~predictions["correct"]]
    counts = Counter(zip(wrong["label"], wrong["prediction"], strict=True))
    return [(label, prediction, count) for (label, prediction), count in counts.most_common(n)]


def _mistake(row: "pd.Series[Any]", root: Path) -> dict[str, Any]:
    picture = pictures.thumbnail(root / row["file"], _THUMBNAIL_SIDE)
    uri = None
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        uri = _uri("image/jpeg", buffer.getvalue())
    probability = row["probability"]
    return {
        "file": row["file"],
        "label": row["label"],
        "prediction": row["prediction"] or "no prediction",
        "probability": "" if math.isnan(probability) else f"{probability:.1%}",
        "picture": uri,
    }


def _comparisons(metrics: dict[str, Any]) -> list[Comparison]:
    comparisons = []
    for name, value in metrics.items():
        if _is_comparison(value):
            columns = list(dict.fromkeys(key for row in value.values() for key in row))
            rows = [
                (_words(key), [_text(column, row.get(column)) for column in columns])
                for key, row in value.items()
            ]
            comparisons.append(Comparison(_words(name), [_words(c) for c in columns], rows))
    return comparisons


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in metrics.items():
        name = f"{prefix}{_words(key)}"
        if isinstance(value, dict):
            if not (prefix == "" and _is_comparison(value)):
                rows += _flat(value, f"{name}: ")
        else:
            rows.append((name, _text(key, value)))
    return rows


def _is_comparison(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 1
        and all(
            isinstance(row, dict) and not any(isinstance(cell, dict) for cell in row.values())
            for row in value.values()
        )
    )


# Numbers as people read them.


def _best(history: "pd.DataFrame", column: str) -> tuple[float, int] | None:
    if column not in history or not history[column].notna().any():
        return None
    values = history[column].to_numpy(dtype=float)
    position = max(
        range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i]
    )
    return float(values[position]), position + 1


def _interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval at 95 %, which holds for few images and near 100 % too."""
    from scipy.stats import binomtest

    low, high = binomtest(right, total).proportion_ci(0.95, "wilson")
    return float(low), float(high)


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        value = float(value)  # how keras_xfer.files writes what JSON has no number for
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            return str(value)
        if "accuracy" in key and 0 <= value <= 1:
            return f"{value:.1%}"
        if key.endswith("seconds"):
            return duration(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)

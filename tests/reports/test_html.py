import base64
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from keras_xfer.reports import html, write_report

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects tags with their attributes, the text, and the rows of tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open, self.rows = [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def images(self):
        return {attrs["alt"]: attrs["src"] for tag, attrs in self.tags if tag == "img"}


def write_history(run, epochs=4, **columns):
    table = pd.DataFrame(
        {
            "epoch": range(epochs),
            "loss": np.linspace(2, 1, epochs),
            "accuracy": np.linspace(0.2, 0.8, epochs),
            "val_loss": np.linspace(2, 1.5, epochs),
            "val_accuracy": np.linspace(0.1, 0.625, epochs),
            "stage": [0] * (epochs // 2) + [1] * (epochs - epochs // 2),
            "epoch_seconds": 30.0,
            **columns,
        }
    )
    table.to_csv(run / "history.csv", index=False)


def write_predictions(run, names, n=40, wrong=5):
    labels = [names[i % len(names)] for i in range(n)]
    answers = [
        names[(i + 1) % len(names)] if i < wrong else label for i, label in enumerate(labels)
    ]
    pd.DataFrame(
        {
            "file": [f"pictures/{i}.png" for i in range(n)],
            "label": labels,
            "prediction": answers,
            "probability": np.linspace(0.99, 0.5, n),
            "correct": [a == b for a, b in zip(labels, answers, strict=True)],
        }
    ).to_csv(run / "predictions.csv", index=False)
    (run / "labels.json").write_text(json.dumps(names), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_history(run)
    write_predictions(run, ["cat", HOSTILE, "犬 & $x$"])
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (300, 200), (255, 0, 0)).save(tmp_path / "pictures" / "0.png")
    metrics = {
        "val_accuracy": 0.625,
        "val_loss": "NaN",
        "total_seconds": 125.0,
        "images": 12345,
        "nothing": None,
        "runs": {"from scratch": {"accuracy": 0.5}, "staged": {"accuracy": 0.75, "epochs": 3}},
        "nested": {"deep": {"x": 1}},
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    pd.DataFrame({"file": [f"a/{HOSTILE}.jpg", "NA"], "reason": ["empty file", "None"]}).to_csv(
        run / "skipped.csv", index=False
    )
    return run


def test_the_page_says_what_the_files_say(run):
    path = write_report(run, images=run.parent, title="Cats & <dogs>")
    assert path == run / "report.html"
    page = Page(path)
    assert page.open == []
    for text in (
        "Cats & <dogs>",
        "87.5%",  # 35 of 40
        "35 of 40 images",
        "73.9% to 94.5%",  # Wilson's interval, computed by hand
        "62.5%",
        "in epoch 4",
        "2 min 00 s",
        "5 wrong predictions in all",
        "12,345",
        "2 min 05 s",
        "from scratch",
        "75.0%",
        "nested: deep: x",
        "犬 & $x$",
        HOSTILE,
        "empty file",
        "pictures/0.png",
    ):
        assert text in page.text, text
    assert set(page.images()) >= {
        "Loss and metrics by epoch",
        "Confusion matrix",
        "Precision, recall and F1 by class",
        "Seconds of each epoch, by stage",
        "pictures/0.png",
    }


def test_nothing_is_loaded_and_nothing_runs(run):
    path = write_report(run, images=run.parent)
    page = Page(path)
    assert "script" not in [tag for tag, _ in page.tags]
    assert all(source.startswith("data:image/") for source in page.images().values())
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", source)
    assert "@import" not in source
    assert "url(" not in source
    assert path.stat().st_size < 2_000_000
    for address in page.images().values():
        if address.startswith("data:image/svg"):
            drawing = base64.b64decode(address.partition(",")[2]).decode()
            assert "<script" not in drawing


def test_letters_that_matplotlibs_font_lacks_are_kept(run):
    drawing = Page(write_report(run)).images()["Confusion matrix"]
    assert "犬" in base64.b64decode(drawing.partition(",")[2]).decode()


def test_stages_are_called_as_in_the_metrics(run):
    def curves():
        drawing = Page(write_report(run)).images()["Loss and metrics by epoch"]
        return base64.b64decode(drawing.partition(",")[2]).decode()

    assert ">stage 2</text>" in curves()
    metrics = {"stages": {"head": {"epochs": 2}, "fine-tuning": {"epochs": 2}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "stage 2" not in curves()
    assert re.search(r">head</text>.*>fine-tuning</text>", curves(), re.DOTALL)
    # Fewer than there are stages are those of something else.
    (run / "metrics.json").write_text(json.dumps({"stages": {"head": {"epochs": 2}}}))
    assert ">stage 2</text>" in curves()


def test_only_the_images_that_are_there_are_shown(run):
    page = Page(write_report(run, images=run.parent))
    assert page.text.count("image not found") == 4
    assert Page(write_report(run)).text.count("image not found") == 5


@pytest.mark.parametrize(
    "missing", ["predictions.csv", "metrics.json", "labels.json", "skipped.csv", "all"]
)
def test_a_missing_file_leaves_its_section_out(run, missing):
    files = ["predictions.csv", "metrics.json", "labels.json", "skipped.csv"]
    for name in files if missing == "all" else [missing]:
        (run / name).unlink()
    page = Page(write_report(run))
    gone = missing == "all"
    assert ("Confusion matrix" in page.images()) == (not gone and missing != "predictions.csv")
    assert ("All figures" in page.text) == (not gone and missing != "metrics.json")
    assert ("Skipped images" in page.text) == (not gone and missing != "skipped.csv")
    assert "Loss and metrics by epoch" in page.images()


def test_without_history(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"with a history\.csv"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "epoch,loss\n", "loss\n1.0\n", "epoch,loss\n0,\n1,nan\n"])
def test_odd_histories(tmp_path, content):
    (tmp_path / "history.csv").write_text(content)
    (tmp_path / "predictions.csv").write_text("file,label,prediction,probability,correct\n")
    (tmp_path / "skipped.csv").write_text("file,reason\n")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "labels.json").write_text("[]")
    Page(write_report(tmp_path))


@pytest.mark.parametrize("classes", [1, 2, 10, 120])
def test_any_number_of_classes(tmp_path, classes):
    write_history(tmp_path, epochs=1)
    names = [str(i) for i in range(classes)]  # digits stay names
    write_predictions(tmp_path, names, n=3 * classes, wrong=0 if classes == 1 else 3)
    page = Page(write_report(tmp_path))
    assert f"{classes} classes" in page.text
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_predictions_of_nan(tmp_path):
    write_history(tmp_path, val_accuracy=np.nan, epoch_seconds=np.nan)
    (tmp_path / "predictions.csv").write_text(
        "file,label,prediction,probability,correct\n1.png,a,,,False\n2.png,b,,,False\n"
    )
    page = Page(write_report(tmp_path))
    assert "no prediction" in page.text
    assert "Seconds of each epoch, by stage" not in page.images()


def test_many_skipped_images_are_cut(tmp_path):
    write_history(tmp_path)
    rows = pd.DataFrame({"file": [f"{i}.jpg" for i in range(500)], "reason": "empty file"})
    rows.to_csv(tmp_path / "skipped.csv", index=False)
    page = Page(write_report(tmp_path))
    assert "500 left out; the first 200 are shown" in page.text
    assert page.text.count("empty file") == 200


def write_trials(run, count=14, failed=3, **columns):
    scores = [0.5 + (i * 5 % 14) / 100 for i in range(count - failed)] + [np.nan] * failed
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\n'
    errors = [f"{traceback}ValueError: {HOSTILE} is no layer\nmore", "OOM", f"{traceback}OOM: x"]
    table = pd.DataFrame(
        {
            "trial": [f"{i:02}" for i in range(count)],
            "stage": ["head", f"fine-{HOSTILE}"] * (count // 2) + [""] * (count % 2),
            "status": ["completed"] * (count - failed) + ["failed"] * failed,
            "objective": "val_accuracy",
            "direction": "max",
            "score": scores,
            "best_epoch": 1,
            "epochs": 7,
            "seconds": 60.25,
            "hp.learning_rate": [1e-5 * 2**i for i in range(count)],
            "hp.backbone": [HOSTILE, "$x$"] * (count // 2) + [None] * (count % 2),
            "hp.constant": "everywhere",
            "error": [""] * (count - failed) + [errors[i % 3] for i in range(failed)],
            **columns,
        }
    )
    table.to_csv(run / "trials.csv", index=False)
    return table


SEARCH_FIGURES = {
    "Score of each trial, and the best so far",
    "Hyperparameters and score of each completed trial",
}


def test_a_search_has_its_section(run):
    trials = write_trials(run)
    page = Page(write_report(run))
    assert page.open == []
    assert "script" not in [tag for tag, _ in page.tags]
    assert set(page.images()) > {*SEARCH_FIGURES, "Loss and metrics by epoch"}
    assert "14 trials in 14 min 04 s: 11 completed, 3 failed." in page.text
    header = page.rows.index(
        ["trial", "val accuracy", "stage", "epochs", "seconds", "learning_rate", "backbone"]
    )
    best = trials.sort_values("score", ascending=False, kind="stable")[:10]
    for row, (_, trial) in zip(page.rows[header + 1 :], best.iterrows(), strict=False):
        assert row[:5] == [trial["trial"], f"{trial['score']:.4g}", trial["stage"], "7", "60.2"]
        assert float(row[5]) == pytest.approx(trial["hp.learning_rate"], rel=1e-3)
        assert row[6] == trial["hp.backbone"]
    assert page.rows[header + 11] == ["trials", "error"]
    assert sorted(page.rows[header + 12 : header + 15]) == [
        ["1", "OOM"],
        ["1", "OOM: x"],
        ["1", f"ValueError: {HOSTILE} is no layer"],
    ]
    assert "3 failed trials" in page.text
    assert "constant" not in page.text
    assert "trials.csv, history.csv" in page.text


def test_errors_are_counted_and_cut(tmp_path):
    errors = ["one"] * 3 + ["", ""] + [f"error {i}" for i in range(12)]
    write_trials(tmp_path, 20, 17, error=["noise"] * 3 + errors)
    page = Page(write_report(tmp_path))
    assert "17 failed trials" in page.text
    errors = page.rows[page.rows.index(["trials", "error"]) + 1 :]
    assert errors[:3] == [["3", "one"], ["2", "no error was noted"], ["1", "error 0"]]
    assert len(errors) == 10
    assert "4 more errors in trials.csv" in page.text
    assert "noise" not in page.text


def test_a_search_without_a_result_says_so(tmp_path):
    write_trials(tmp_path, 3, 3)
    page = Page(write_report(tmp_path))
    assert "3 trials in 3 min 01 s: 0 completed, 3 failed." in page.text
    assert "No trial has completed" in page.text
    assert page.images() == {}
    assert "OOM: x" in page.text
    (tmp_path / "trials.csv").write_text("trial,status,objective,direction,score\n")
    assert "0 trials: 0 completed." in Page(write_report(tmp_path)).text


def test_a_search_in_which_nothing_varies(tmp_path):
    write_trials(tmp_path, 1, 0)
    page = Page(write_report(tmp_path))
    assert set(page.images()) == {"Score of each trial, and the best so far"}
    assert "1 trial in 1 min 00 s: 1 completed." in page.text


def test_inactive_values_and_unknown_ones_in_the_table_of_trials(tmp_path):
    rates = [1e-4, np.nan, *[1e-3] * 2]
    write_trials(tmp_path, 4, 0, epochs=[1, None, 1, 1], **{"hp.learning_rate": rates})
    header, *rows = Page(write_report(tmp_path)).rows
    column = header.index("learning_rate")
    found = {row[0]: (row[header.index("epochs")], row[column]) for row in rows}
    assert found == {
        "00": ("1", "1e-4"),
        "01": ("", "\N{EN DASH}"),
        "02": ("1", "0.001"),
        "03": ("1", "0.001"),
    }


def test_a_trials_csv_of_something_else(run):
    (run / "trials.csv").write_text("epoch,loss\n0,1.0\n")
    with pytest.raises(ValueError, match=r"are missing.*trials\.csv' with the columns"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_run_without_a_search_has_no_trace_of_one(run):
    page = Page(write_report(run))
    assert not SEARCH_FIGURES & set(page.images())
    assert "Search" not in page.text
    assert "trials" not in page.text
    write_trials(run)
    write_report(run)
    (run / "trials.csv").unlink()
    assert Page(write_report(run)).text == page.text


def test_a_failure_leaves_the_old_report(run, monkeypatch):
    write_report(run)
    before = (run / "report.html").read_bytes()
    (run / "metrics.json").write_text('["a list"]')
    with pytest.raises(ValueError, match=r"JSON dict in metrics\.json"):
        write_report(run)

    def full(path, text):
        raise OSError(28, "No space left on device")

    (run / "metrics.json").unlink()
    monkeypatch.setattr(html.files, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def test_the_same_run_gives_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_missing_library_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'jinja2.*pip install "keras-xfer\[report\]"'):
        write_report(run)

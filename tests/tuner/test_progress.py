"""The lines of a search, of outcomes that are made up."""

import os

import keras_tuner
import pytest

from keras_xfer import files
from keras_xfer.tuner.progress import SearchProgress


class Project:
    """A folder in which trials end."""

    def __init__(self, path):
        self.path = path
        self.count = 0

    def end(self, score=0.5, *, seconds=1.0, round=0, stage="head", error=""):  # noqa: A002
        name = f"{self.count:04d}"
        folder = self.path / f"trial_{name}"
        folder.mkdir()
        files.write_json(
            folder / "outcome.json",
            {
                "trial": name,
                "candidate": name,
                "round": round,
                "status": "failed" if error else "completed",
                "stage": "" if error else stage,
                "score": float("nan") if error else score,
                "best_epoch": None,
                "epochs": 0,
                "seconds": seconds,
                "error": error,
            },
        )
        os.utime(folder / "outcome.json", (self.count, self.count))  # one after the other
        self.count += 1


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def progress(project, planned, direction="max", **kwargs):
    said = []
    objective = keras_tuner.Objective("val_accuracy", direction)
    made = SearchProgress(project.path, objective, planned, say=said.append, **kwargs)
    return made, said


def test_a_line_for_each_trial_that_ended(project):
    told, said = progress(project, [3, 1])
    told.update()
    assert said == []
    project.end(0.25, seconds=2)
    told.update()
    told.update()
    assert len(said) == 1
    assert said[0].startswith(
        "Trial 1 of 4, head: val_accuracy 0.25; best 0.25 (trial 0000); 2.0 s"
    )
    project.end(0.75, seconds=90)
    project.end(0.5, seconds=3)
    told.update()  # two at once, from other processes, in the order in which they ended
    assert [line.split(";")[0] for line in said[1:]] == [
        "Trial 2 of 4, head: val_accuracy 0.75",
        "Trial 3 of 4, head: val_accuracy 0.5",
    ]
    assert "best 0.75 (trial 0001)" in said[2]
    project.end(0.6, seconds=3700, round=1, stage="fine-tuning")
    told.update()
    assert said[3] == (
        "Trial 4 of 4, fine-tuning: val_accuracy 0.6; best 0.75 (trial 0001); 1 h 02 min"
    )
    assert told.num_ended == 4


def test_less_may_be_better(project):
    told, said = progress(project, None, "min")
    project.end(0.25)
    project.end(0.75)
    told.update()
    assert said == [
        "Trial 1, head: val_accuracy 0.25; best 0.25 (trial 0000); 1.0 s",
        "Trial 2, head: val_accuracy 0.75; best 0.25 (trial 0000); 1.0 s",
    ]
    assert told.seconds_left() is None


def test_a_trial_that_failed_says_why_in_a_line(project):
    told, said = progress(project, None)
    trace = "Traceback (most recent call last):\n  File ...\nValueError: " + "x" * 500 + "\n"
    project.end(error=trace)
    project.end(0.5)
    told.update()
    assert said[0].startswith("Trial 1, failed: ValueError: xxx")
    assert len(said[0]) < 250
    assert "best" not in said[0]
    assert said[1].endswith("best 0.5 (trial 0001); 1.0 s")


def test_what_an_earlier_process_did_counts_and_is_not_told_again(project):
    project.end(0.9, seconds=4)
    told, said = progress(project, [3])
    assert told.num_ended == 1
    assert told.seconds_left()[0] == 2 * 4
    project.end(0.5, seconds=4)
    told.update()
    assert said == [
        "Trial 2 of 3, head: val_accuracy 0.5; best 0.9 (trial 0000); 4.0 s, about 4.0 s left"
    ]


def test_the_time_left_by_the_rounds(project):
    told, said = progress(project, [4, 2], workers=2)
    assert told.seconds_left() is None
    project.end(seconds=10)
    project.end(seconds=20)
    project.end(seconds=30)
    told.update()
    # One of 20, and at least 20 each for the two of a round of which none is over, two at a time.
    assert told.seconds_left() == (pytest.approx((20 + 2 * 20) / 2), False)
    assert said[-1].endswith(", at least 30 s left")
    project.end(seconds=20)
    project.end(seconds=100, round=1)
    told.update()
    assert told.seconds_left() == (pytest.approx(50), True)
    assert said[-1].endswith(", about 50 s left")
    project.end(seconds=100, round=1)
    told.update()
    assert told.seconds_left() == (0, True)
    assert "left" not in said[-1]

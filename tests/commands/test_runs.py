import json
import shutil
from pathlib import Path

import pytest

from keras_xfer.commands import runs
from keras_xfer.commands.recipe import UsageError
from keras_xfer.commands.runs import OUTPUTS, RunFolder

OLD, NEW = {"seed": 1}, {"seed": 2}
BACKUP = ("best.keras", "best.keras.json", "training_state.zip")


def write(run, *names):
    for name in names:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text('{"of": "the old run"}')


@pytest.fixture
def run(tmp_path):
    """A run of `OLD` that has ended."""
    run = RunFolder(tmp_path / "run")
    with run.writing(OLD):
        write(run, *OUTPUTS)
    return run


def unfinished(run):
    write(run, *(f"unfinished/{name}" for name in BACKUP))


@pytest.fixture
def kills(tmp_path, monkeypatch):
    """What each process would leave that is killed before or after one of the file operations."""
    states = []

    def copied(run):
        states.append(tmp_path / f"state {len(states)}")
        shutil.copytree(run, states[-1])

    def watch(run):
        def watched(operation):
            def operate(path, *args, **kwargs):
                copied(run.path)
                operation(path, *args, **kwargs)
                copied(run.path)

            return operate

        monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
        monkeypatch.setattr(runs.files, "write_json", watched(runs.files.write_json))
        return states

    return watch


def resumes(folder, record):
    """What `--resume` finds in a folder."""
    run = RunFolder(folder)
    try:
        run.check_resumable(record)
    except UsageError:
        return "refused"
    if run.finished() is not None:
        return "ended"
    return "goes on" if run.is_unfinished() else "begins"


@pytest.mark.parametrize("state", ["ended", "unfinished", "both", "searching"])
@pytest.mark.parametrize("record", [OLD, NEW])
def test_wherever_a_new_run_is_killed_no_old_result_is_taken_for_its_own(run, kills, state, record):
    """`both`: cut off while the report was written. `searching`: interrupted, with the best so far."""
    if state == "searching":
        write(run, "search/oracle.json")
    elif state != "ended":
        unfinished(run)
    if state == "unfinished":
        run.remove("metrics.json")
    states = kills(run)
    with run.writing(record):
        pass
    before, after = resumes(states[0], OLD), resumes(states[-1], record)
    assert (before, after) == ("ended" if state == "ended" else "goes on", "begins")
    assert len(states) > 20
    if record is OLD:
        # Nothing incomplete is taken for a run that has ended, nor half a backup for a whole one.
        for each in states:
            found = resumes(each, OLD)
            assert found in ("goes on", "begins", *(["ended"] if state == "ended" else []))
            assert (RunFolder(each).time_finished() is None) == (found != "ended")
            if found == "ended":
                assert all((each / name).exists() for name in OUTPUTS)
            if found == "goes on" and state != "searching":
                assert all((each / "unfinished" / name).exists() for name in BACKUP)
    else:
        assert {resumes(each, NEW) for each in states} == {"refused", "begins"}


def test_wherever_the_end_of_a_run_is_killed_it_has_ended_or_goes_on(run, kills):
    unfinished(run)
    states = kills(run)
    with run.writing(OLD, resume=True):
        pass
    found = [resumes(each, OLD) for each in states]
    assert found == ["goes on"] + ["ended"] * 5
    for each in states[:1]:
        assert all((each / "unfinished" / name).exists() for name in BACKUP)
    assert not (run / "unfinished").exists()


def test_what_there_is_to_go_on_from_survives_any_failure(run):
    unfinished(run)
    run.remove("history.csv")
    with pytest.raises(RuntimeError), run.writing(OLD, resume=True):
        raise RuntimeError
    assert run.is_unfinished()


@pytest.mark.parametrize("is_searching", [False, True])
def test_a_search_that_is_half_removed_is_not_gone_on_with(run, is_searching):
    (run / "search" / "trial_0").mkdir(parents=True)
    write(run, "search/trial_0/outcome.json", *(["search/oracle.json"] if is_searching else []))
    with run.writing(OLD, resume=True):
        assert (run / "search").exists() == is_searching


def test_somebody_elses_backup_is_refused(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "training_state.zip").touch()
    with pytest.raises(UsageError, match=r"holds unfinished/training_state\.zip"):
        RunFolder(tmp_path)


# What `--resume` refuses


def refusal(run, then, now):
    (run / "run.json").write_text(json.dumps(then))
    with pytest.raises(UsageError) as caught:
        run.check_resumable(now)
    return str(caught.value)


def test_differences_of_stages_name_the_stage(run):
    head = {"unfreeze": None, "epochs": 1, "name": "head"}
    then = {"stages": [head, {"unfreeze": "all", "learning_rate": 1e-4}]}

    def difference(now):
        return (
            refusal(run, then, {"stages": now}).partition("otherwise: ")[2].partition(". Give")[0]
        )

    changed = [{**head, "epochs": 2}, {"unfreeze": "all", "learning_rate": 1e-5, "patience": 3}]
    assert difference(changed) == (
        "epochs of stage 1 (head) was 1 and is 2; learning_rate of stage 2 was 0.0001 and is 1e-05; "
        "patience of stage 2 was left out and is 3"
    )
    assert difference([head]) == "--stages had 2 stages and has 1"
    assert difference(None) == "--stages was given"
    assert "--stages was not given" in refusal(run, {"stages": None}, {"stages": [head]})


def test_changed_images_are_said_in_words(run):
    then = {"seed": 1, "images_fingerprint": "0a" * 32}
    said = refusal(run, then, {"seed": 1, "images_fingerprint": "1b" * 32})
    assert "the images have changed since" in said
    assert "0a0a" not in said
    assert "1b1b" not in said
    # Another seed draws other splits of the same images.
    said = refusal(run, then, {"seed": 2, "images_fingerprint": "1b" * 32})
    assert "seed was 1 and is 2" in said
    assert "the images" not in said

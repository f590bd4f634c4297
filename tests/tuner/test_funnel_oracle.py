"""Which trials a funnel runs: driven by hand, with scores that are made up."""

import itertools
import json
import math
import tempfile
from pathlib import Path
from unittest import mock

import keras_tuner
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_xfer.tuner import FunnelOracle


def space(*choices):
    """Of a number, or of these choices alone."""
    hp = keras_tuner.HyperParameters()
    if choices:
        hp.Choice("x", list(choices))
    else:
        hp.Float("x", 0.0, 1.0)
    return hp


def make(max_trials, objective="val_accuracy", *, folder=None, hp=None, seed=1, **kwargs):
    """An oracle; without a folder one that writes nothing."""
    oracle = FunnelOracle(objective, max_trials, seed=seed, hyperparameters=hp or space(), **kwargs)
    oracle.verbose = 0
    if folder is None:
        oracle.save = oracle._save_trial = lambda *args: None
    else:
        oracle._set_project_dir(str(folder), "search")
        if (folder / "search" / "oracle.json").exists():
            oracle.reload()
    return oracle


def end(oracle, trial, score):
    """As KerasTuner's `on_trial_end`; `None`: it failed."""
    if score is None:
        trial.status, trial.message = "INVALID", "Traceback: made up"
    else:
        oracle.update_trial(trial.trial_id, {oracle.objective.name: score})
        trial.status = "COMPLETED"
    oracle.end_trial(trial)


def by_value(trial):
    return trial.hyperparameters.get("x")


def drive(oracle, score=by_value, *, workers=1, seed=0, most=10_000):
    """Let workers take and end trials in some order, until each is told to stop, or `most` have
    ended; what they had then is cut off."""
    rng = np.random.default_rng(seed)
    left, running = [f"tuner{i}" for i in range(workers)], {}
    ended = 0
    while left and ended < most:
        free = [each for each in left if each not in running]
        waits = not free
        if free and (not running or rng.random() < 0.6):
            name = free[rng.integers(len(free))]
            trial = oracle.create_trial(name)
            assert trial.status in ("RUNNING", "IDLE", "STOPPED")
            if trial.status == "RUNNING":
                assert trial.trial_id not in [each.trial_id for each in running.values()]
                running[name] = trial
            elif trial.status == "STOPPED":
                left.remove(name)
            else:
                assert running, "it waits for a trial that nobody is at"
                waits = True
        if running and (waits or rng.random() < 0.4):
            name = list(running)[rng.integers(len(running))]
            trial = running.pop(name)
            end(oracle, trial, score(trial))
            ended += 1
    return oracle


def by_round(oracle):
    """The trials of each round in the order in which they began."""
    found = [[] for _ in oracle.rounds]
    for trial_id in oracle.start_order:
        trial = oracle.trials[trial_id]
        found[trial.hyperparameters.values["tuner/round"]].append(trial)
    return found


def parents(trials):
    return [trial.hyperparameters.values.get("tuner/trial_id") for trial in trials]


def best(trials, count, direction):
    """The best completed of these, by sorting."""
    done = [trial for trial in trials if trial.status == "COMPLETED"]
    done.sort(key=lambda trial: -trial.score if direction == "max" else trial.score)
    return [trial.trial_id for trial in done][:count]


def check(oracle, *, candidates=None):
    """The laws of a funnel that is over."""
    rounds = by_round(oracle)
    count = oracle.rounds[0][0] if candidates is None else candidates
    assert len(rounds[0]) == count
    assert sorted(oracle.end_order) == sorted(oracle.trials) == sorted(set(oracle.start_order))
    assert not oracle.ongoing_trials
    values = [by_value(trial) for trial in rounds[0]]
    assert len(set(values)) == len(values)
    assert parents(rounds[0]) == [None] * count
    for number, trials in enumerate(rounds):
        size, epochs = oracle.rounds[number]
        for trial in trials:
            told = trial.hyperparameters.values
            assert told["tuner/epochs"] == epochs
            assert told["tuner/initial_epoch"] == (oracle.rounds[number - 1][1] if number else 0)
            assert told["tuner/head_epochs"] == oracle.head_epochs
        if number:
            # The best first, so that the order in which they began is the order of their scores.
            assert parents(trials) == best(rounds[number - 1], size, oracle.objective.direction)
            for trial, parent in zip(trials, parents(trials), strict=True):
                assert by_value(trial) == by_value(oracle.trials[parent])


# --- The plan --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_trials", "finalists", "head_epochs", "fine_tune_epochs", "factor", "rounds"),
    [
        (20, 3, 9, 6, 3, [(20, 3), (7, 9), (3, 15)]),
        (30, 3, 9, 6, 3, [(30, 1), (10, 3), (4, 9), (3, 15)]),
        (8, 2, 8, 4, 2, [(8, 4), (4, 8), (2, 12)]),
        (16, 1, 16, 1, 4, [(16, 4), (4, 16), (1, 17)]),
        (3, 3, 5, 2, 3, [(3, 5), (3, 7)]),
        (2, 5, 1, 1, 2, [(2, 1), (2, 2)]),
        (1, 1, 1, 1, 2, [(1, 1), (1, 2)]),
        (20, 3, 1, 2, 3, [(20, 1), (3, 3)]),  # of one epoch nothing is a third
        (100, 3, 2, 2, 3, [(100, 1), (4, 2), (3, 4)]),
    ],
)
def test_rounds(max_trials, finalists, head_epochs, fine_tune_epochs, factor, rounds):
    oracle = FunnelOracle(
        "val_loss",
        max_trials,
        finalists=finalists,
        head_epochs=head_epochs,
        fine_tune_epochs=fine_tune_epochs,
        factor=factor,
    )
    assert oracle.rounds == rounds
    assert oracle.max_epochs == head_epochs + fine_tune_epochs


@pytest.mark.parametrize("name", ["max_trials", "finalists", "head_epochs", "fine_tune_epochs"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_counts_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} to be an int of at least 1.*{name}={value!r}"):
        FunnelOracle("val_loss", **{"max_trials": 4, name: value})


def test_a_factor_of_one_halves_nothing():
    with pytest.raises(ValueError, match="factor to be an int of at least 2.*factor=1"):
        FunnelOracle("val_loss", 4, factor=1)


plans = st.fixed_dictionaries(
    {
        "max_trials": st.integers(1, 30),
        "finalists": st.integers(1, 6),
        "head_epochs": st.integers(1, 12),
        "fine_tune_epochs": st.integers(1, 5),
        "factor": st.integers(2, 4),
    }
)


@given(plans)
def test_what_every_plan_keeps_to(plan):
    oracle = FunnelOracle("val_loss", plan.pop("max_trials"), **plan)
    sizes, epochs = zip(*oracle.rounds, strict=True)
    assert all(one < other for one, other in itertools.pairwise(epochs))
    assert all(one >= other for one, other in itertools.pairwise(sizes))
    assert epochs[-2:] == (plan["head_epochs"], plan["head_epochs"] + plan["fine_tune_epochs"])
    assert sizes[-1] == min(plan["finalists"], sizes[0])
    # No round of heads is one that could have been a fine-tuning.
    assert all(size > plan["finalists"] for size in sizes[1:-1])
    # What the heads train costs no more than a round of all of them would for each round.
    factor = plan["factor"]
    for number in range(len(sizes) - 2):
        assert sizes[number + 1] <= math.ceil(sizes[number] / factor)
        assert epochs[number] <= math.ceil(epochs[number + 1] / factor)


# --- Running it ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_each_round_takes_the_best_of_the_one_before(objective, workers, factor):
    oracle = make(17, objective, finalists=2, head_epochs=8, factor=factor)
    check(drive(oracle, workers=workers))
    assert [len(trials) for trials in by_round(oracle)] == [size for size, _ in oracle.rounds]


@pytest.mark.parametrize("seed", [1, 2])
def test_what_acts_once_the_backbone_thaws_is_spread_over_the_finalists(seed, tmp_path):
    hp = space()
    hp.Float("backbone_learning_rate", 1e-5, 1e-3, sampling="log")
    hp.Choice("unfreeze", [0.25, 0.6])
    plan = {"hp": hp, "finalists": 5, "head_epochs": 9, "seed": seed}
    whole, half = make(20, **plan), make(20, folder=tmp_path, **plan)
    drive(whole)
    drive(half, most=len(whole.trials) - 3)  # cut off among the finalists
    rest = make(20, folder=tmp_path, **plan)
    drive(rest)
    for oracle in (whole, rest):
        check(oracle)
        *_, finalists = by_round(oracle)
        rates = [trial.hyperparameters.get("backbone_learning_rate") for trial in finalists]
        # One in each fifth of the range, by its logarithm.
        assert sorted(math.floor(5 * (math.log10(rate) + 5) / 2) for rate in rates) == [*range(5)]
        starts = [trial.hyperparameters.get("unfreeze") for trial in finalists]
        assert sorted(map(starts.count, (0.25, 0.6))) == [2, 3]


def test_a_later_score_counts_and_not_that_of_the_head():
    oracle = make(12, finalists=1, head_epochs=8, factor=2)
    scores = iter([*range(12), *(10 - i for i in range(6)), *range(99)])
    drive(oracle, lambda trial: next(scores))
    first, second, *_ = by_round(oracle)
    # Of twelve the later half, the best first; of these again the best, which began first.
    assert parents(second) == [trial.trial_id for trial in first[:5:-1]]
    check(oracle)


def test_equal_scores_are_taken_in_the_order_in_which_they_began():
    oracle = drive(make(9, finalists=2, head_epochs=4, factor=2), lambda trial: 0.5, workers=3)
    for earlier, later in itertools.pairwise(by_round(oracle)):
        ids = [trial.trial_id for trial in earlier]
        assert parents(later) == ids[: len(later)]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_trial_is_never_taken(workers, failing):
    oracle = make(12, finalists=2, head_epochs=6, fine_tune_epochs=2, factor=2)

    def score(trial):  # the better half of each round fails, or of one
        is_good = by_value(trial) > 0.4 and trial.hyperparameters.values["tuner/round"] == failing
        return None if is_good else by_value(trial)

    check(drive(oracle, score, workers=workers))
    failed = [trial for trial in oracle.trials.values() if trial.status == "FAILED"]
    assert failed
    assert all(trial.message == "Traceback: made up" for trial in failed)
    assert by_round(oracle)[-1] or failing


def test_fewer_that_completed_than_a_round_takes():
    oracle = make(9, finalists=2, head_epochs=3)
    kept = iter([None, 0.3, *[None] * 7, *[0.1] * 9])
    drive(oracle, lambda trial: next(kept))
    check(oracle)
    assert [len(trials) for trials in by_round(oracle)] == [9, 1, 1]


@pytest.mark.parametrize("score", [None, math.nan])
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_all_fail_and_it_ends(score):
    oracle = make(7, "val_loss", finalists=2, head_epochs=3)
    drive(oracle, lambda trial: score, workers=2)
    assert [len(trials) for trials in by_round(oracle)] == [7, 0, 0]
    assert {trial.status for trial in oracle.trials.values()} == {"FAILED"}


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_not_a_number_is_no_score():
    oracle = make(8, "val_loss", finalists=8, head_epochs=1)
    drive(oracle, lambda trial: math.nan if by_value(trial) < 0.5 else by_value(trial))
    assert 0 < len(by_round(oracle)[1]) < 8
    assert min(by_value(oracle.trials[each]) for each in parents(by_round(oracle)[1])) >= 0.5
    check(oracle)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_space_of_few_candidates(workers):
    oracle = make(20, hp=space(1.0, 2.0, 3.0, 4.0), finalists=2, head_epochs=9)
    check(drive(oracle, workers=workers), candidates=4)
    first, *_, last = by_round(oracle)
    assert {by_value(trial) for trial in first} == {1.0, 2.0, 3.0, 4.0}
    assert [by_value(trial) for trial in last] == [4.0, 3.0]


def test_a_worker_that_asks_again_keeps_its_trial():
    oracle = make(3)
    first = oracle.create_trial("tuner0")
    assert oracle.create_trial("tuner0").trial_id == first.trial_id
    assert oracle.create_trial("tuner1").trial_id != first.trial_id


def test_told_twice_that_a_trial_is_over():
    oracle = make(2, finalists=1)
    trial = oracle.create_trial("tuner0")
    end(oracle, trial, 0.4)
    oracle.end_trial(trial)
    assert oracle.end_order == [trial.trial_id]
    check(drive(oracle))


def test_the_seed_decides_the_candidates():
    values = [[by_value(t) for t in by_round(drive(make(6, seed=s)))[0]] for s in (3, 3, 4, 0, 0)]
    assert values[0] == values[1] != values[2]
    assert values[3] == values[4]  # KerasTuner takes 0 for None
    assert values[0] == [by_value(t) for t in by_round(drive(make(6, seed=3), workers=3))[0]]


@settings(max_examples=60, deadline=None)
@given(
    plans, st.integers(1, 4), st.sampled_from(["val_loss", "val_accuracy"]), st.integers(0, 1000)
)
def test_the_laws_of_every_funnel(plan, workers, objective, seed):
    rng = np.random.default_rng(seed)
    plan = dict(plan)
    oracle = make(plan.pop("max_trials"), objective, **plan)
    drive(
        oracle,
        lambda trial: None if rng.random() < 0.2 else rng.random(),
        workers=workers,
        seed=seed,
    )
    check(oracle)


# --- Going on --------------------------------------------------------------------------------


def copied(oracle, plan):
    """Another oracle that is given the state, through JSON."""
    other = make(**plan)
    trial = keras_tuner.engine.trial.Trial
    states = json.loads(json.dumps([each.get_state() for each in oracle.trials.values()]))
    other.trials = {each["trial_id"]: trial.from_state(each) for each in states}
    other.set_state(json.loads(json.dumps(oracle.get_state(), default=float)))
    return other


@pytest.mark.parametrize("after", [0, 2, 9, 12])
def test_a_state_holds_all(after):
    plan = {"max_trials": 9, "finalists": 2, "head_epochs": 4, "factor": 2}
    whole = drive(make(**plan))
    half = drive(make(**plan), most=after)
    rest = drive(copied(half, plan))
    check(rest)
    assert rest.start_order == whole.start_order
    for name, trial in whole.trials.items():
        assert rest.trials[name].hyperparameters.values == trial.hyperparameters.values


def test_a_state_holds_that_the_space_is_exhausted():
    plan = {"max_trials": 9, "finalists": 1, "head_epochs": 1, "hp": space(1.0, 2.0)}
    half = drive(make(**plan), most=2)
    assert half.create_trial("tuner0").hyperparameters.values["tuner/round"] == 1
    rest = copied(half, plan)
    assert rest._exhausted
    assert rest.ongoing_trials


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=5),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from(["val_loss", "val_accuracy"]),
)
def test_cut_off_again_and_again(moments, workers, seed, objective):
    """Each process ends some trials and is killed with others begun; the last goes to the end."""
    plan = {"objective": objective, "finalists": 2, "head_epochs": 4, "factor": 2}
    failing = set(np.random.default_rng(seed).choice(9, 3, replace=False).tolist())

    def score(trial):  # by its number, so that it is what it is however often it runs
        return None if int(trial.trial_id) in failing else by_value(trial)

    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        over = {}
        for number, most in enumerate([*moments, 10_000]):
            oracle = make(9, folder=Path(folder), **plan)
            assert over == {k: t.score for k, t in oracle.trials.items() if k in oracle.end_order}
            drive(oracle, score, workers=workers, seed=seed + number, most=most)
            over = {each: oracle.trials[each].score for each in oracle.end_order}
        check(oracle)
        whole = drive(make(9, **plan), score)
        assert [by_value(t) for t in by_round(oracle)[0]] == [
            by_value(t) for t in by_round(whole)[0]
        ]
        assert sorted(over) == sorted(whole.trials)

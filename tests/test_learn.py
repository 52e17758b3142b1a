"""The evidence benchmark: scores, draws, resamples and controls on data whose answer is known."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score
from small import small_umbif

from umbif.stream.exams import SEQUENCES
from umbif.stream.patches import patch_grid

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
N = 120
PROBED = [("linear", 64), ("knn", 64), ("finetuned", 64), ("seen", 30), ("unseen", 30)]


@pytest.fixture(scope="module")
def bench():
    """Imports a file of benchmarks/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture
def make_question(bench):
    """A binary question on exams of which some share a person; `signal` is how far the classes lie apart."""

    def make(signal, *, task="idh", seed=0):
        rng = np.random.default_rng(seed)
        person = np.arange(N) - (np.arange(N) % 20 == 19)  # one exam in twenty is a second of the person before
        y = (rng.random(N) < 0.5).astype(float)
        x = rng.standard_normal((N, 6)) + signal * y[:, None]
        (found,) = [t for t in bench("_tasks").TASKS if t.name == task]
        return bench("_probes").Question(found, x, y, np.arange(N), person, person >= N // 2)

    return make


def test_scores_of_whole_weights_are_those_of_the_repeated_rows(bench):
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 4, (3, N))
    score, y = bench("_tasks").score, (rng.random(N) < 0.4).astype(float)
    answer = np.round(y + rng.standard_normal(N), 1)  # with ties
    numbers = rng.standard_normal((N, 2))
    guess = numbers + rng.standard_normal((N, 2))
    classes, votes = rng.integers(0, 3, N), rng.random((N, 3))
    for row, area, r2, share in zip(
        weights, score("binary", y, answer, weights), score("number", numbers, guess, weights),
        score("classes", classes, votes, weights), strict=True,
    ):  # fmt: skip
        at = np.repeat(np.arange(N), row)
        assert area == pytest.approx(roc_auc_score(y[at], answer[at]))
        assert r2 == pytest.approx(r2_score(numbers[at], guess[at], multioutput="variance_weighted"))
        assert share == pytest.approx(accuracy_score(classes[at], votes[at].argmax(1)))


def test_labelled_exams_are_of_as_many_training_people_and_the_same_for_everyone(bench, make_question):
    probes, question = bench("_probes"), make_question(1.0)
    drawn = list(probes.draws(question, 16))
    assert len(drawn) == probes.NUM_DRAWS
    for exams in drawn:
        assert len(np.unique(question.person[exams])) == 16
        assert not question.is_test[exams].any()
        assert min(np.bincount(question.y[exams].astype(int))) >= 2
    other = list(probes.draws(make_question(0.0), 16))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, other, strict=True))
    assert len({tuple(exams) for exams in drawn}) == probes.NUM_DRAWS


def test_a_person_is_resampled_with_all_of_its_exams_and_only_test_people_are(bench, make_question):
    question = make_question(1.0)
    counts = bench("_probes").resamples(question)
    assert not counts[:, ~question.is_test].any()
    people, first = np.unique(question.person[question.is_test], return_index=True)
    assert (counts[:, question.is_test][:, first].sum(1) == len(people)).all()
    twice = np.flatnonzero((question.person[1:] == question.person[:-1]) & question.is_test[1:])
    assert len(twice)
    assert np.array_equal(counts[:, twice], counts[:, twice + 1])


@pytest.mark.parametrize("probe", ["linear", "knn"])
def test_a_probe_finds_what_is_there_and_nothing_where_labels_were_dealt_anew(bench, make_question, probe):
    probes = bench("_probes")

    def score(question):
        return probes.scored(question, probes.probed(question, probe, 32)).draws.mean()

    assert score(make_question(1.5)) > 0.9
    null = [score(probes.shuffled(make_question(1.5), seed)) for seed in range(12)]
    assert np.mean(null) == pytest.approx(0.5, abs=0.06)


def test_intervals_of_null_cells_miss_one_half_as_often_as_they_should(bench, make_question):
    controls = bench("_controls").controls
    made = [(seed, controls(make_question(1.0, seed=seed), seed)) for seed in range(60)]
    cells = [{"arm": "a", "seed": seed, **cell} for seed, found in made for cell in found]
    missed, num, (low, high) = bench("_evidence").null_cells(bench("_evidence").Cells(cells))
    assert num == 60
    assert low <= missed <= high


def test_people_that_are_labelled_and_tested_raise_a_score_that_has_nothing_else_to_go_by(bench, make_question):
    question = make_question(0.0)
    twin = np.flatnonzero(question.person[1:] == question.person[:-1])
    question.x[twin + 1], question.y[twin + 1] = question.x[twin], question.y[twin]  # as two exams of one brain are
    question.y[twin] = question.y[twin + 1] = np.arange(len(twin)) % 2
    found = {cell["probe"]: cell for cell in bench("_controls").controls(question, 0)}
    assert found["seen"]["labels"] == found["unseen"]["labels"] == len(twin)
    assert found["seen"]["score"] == 1
    assert found["unseen"]["score"] < 0.9


def test_a_difference_is_that_of_the_same_seeds_and_resamples(bench):
    evidence, rng = bench("_evidence"), np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 200)  # of the test people: both arms meet the same ones
    cells = [
        {"arm": arm, "task": "idh", "probe": "linear", "labels": 64, "seed": seed, "score": level + 0.001 * seed,
         "resamples": (level + 0.001 * seed + noise).tolist(),
         "draws": [level + 0.001 * seed + draw for draw in (-0.02, 0.02)]}
        for arm, level in (("umbif", 0.8), ("untrained", 0.7)) for seed in range(3)
    ]  # fmt: skip
    fixed = {"score": 0.75, "resamples": (0.75 + noise).tolist(), "draws": [0.73, 0.77]}
    cells.append({**cells[0], "arm": "histogram", "seed": 0, **fixed})
    found = evidence.Cells(cells)
    gain = evidence.difference(found, "umbif", "untrained", "idh", "linear", 64)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    over_histogram = evidence.difference(found, "umbif", "histogram", "idh", "linear", 64)
    assert over_histogram.value == pytest.approx(0.051)
    assert over_histogram.low < 0.051 < over_histogram.high
    alone = evidence.mean(found, "umbif", "idh", "linear", 64)
    assert alone.low < 0.75 < 0.85 < alone.high
    assert evidence.difference(found, "umbif", "mae", "idh", "linear", 64) is None


def test_intervals_hold_the_truth_as_often_as_they_should_though_seeds_are_few(bench):
    rng, evidence, covered = np.random.default_rng(0), bench("_evidence"), []
    for _ in range(100):
        people, draws = rng.normal(0, 1, 200), rng.normal(0, 1, 10)
        drawn = rng.normal(0, 1) + rng.normal(0, 1 / np.sqrt(10))  # of people and of draws, the same for every seed
        seeds = rng.normal(0, 1, (5, 1)) + drawn
        found = evidence.bootstrapped(evidence.Scores(seeds + people - people.mean(), seeds + draws - draws.mean()))
        covered.append(found.low < 0 < found.high)
    assert 0.87 <= np.mean(covered) <= 0.99  # 95 expected, of 100


def test_more_than_another_that_knows_nothing_is_no_gain_for_one_that_knows_nothing(bench):
    evidence, aims, noise = bench("_evidence"), bench("_aims"), np.linspace(-0.01, 0.01, 40)
    levels = {"untrained": -0.3, "placebo": -0.3}
    for own, is_gain in ((-0.05, False), (0.05, True)):
        cells = evidence.Cells(
            {"arm": arm, "task": "age", "probe": "linear", "labels": 64, "seed": seed, "score": level,
             "resamples": (level + noise).tolist(), "draws": [level] * 10}
            for arm, level in {**levels, "umbif": own}.items() for seed in range(3)
        )  # fmt: skip
        assert aims.gains(cells) == (["age"] if is_gain else [])
        assert aims.wins(cells, "untrained", ["age"]) == (["age"] if is_gain else [], [])


def test_a_loss_counts_though_the_other_knows_nothing_either(bench):
    cells = bench("_evidence").Cells(
        {"arm": arm, "task": "age", "probe": "linear", "labels": 64, "seed": seed, "score": level,
         "resamples": [level] * 4, "draws": [level] * 3}
        for arm, level in {"umbif": -0.3, "mae": -0.1}.items() for seed in range(3)
    )  # fmt: skip
    assert bench("_aims").wins(cells, "mae", ["age"]) == ([], ["age"])
    assert "loses to it on age" in bench("_aims").verdict(cells)


def test_the_verdict_names_tasks_that_leave_no_room_for_the_gain_that_is_asked_for(bench):
    evidence, aims = bench("_evidence"), bench("_aims")
    levels = {"lesion": {"untrained": 0.94, "placebo": 0.96}, "idh": {"untrained": 0.93}}
    cells = evidence.Cells(
        {"arm": arm, "task": task, "probe": "linear", "labels": 64, "seed": seed, "score": level,
         "resamples": [level] * 4, "draws": [level] * 3}
        for task, of in levels.items() for arm, level in of.items() for seed in range(2)
    )  # fmt: skip
    assert aims.without_room(cells) == ["lesion"]
    assert "On lesion one of these two knows so much" in aims.verdict(cells)


def test_retrieval_is_perfect_where_both_halves_agree_and_at_chance_where_they_do_not(bench):
    (task,) = [t for t in bench("_tasks").TASKS if t.name == "retrieval"]
    rng = np.random.default_rng(0)
    person = np.arange(N) - (np.arange(N) % 20 == 19)
    targets = pd.DataFrame({"person": person, "test": person >= N // 2})
    half = rng.standard_normal((N, 16))
    for other, low, high in ((half + 0.1, 1.0, 1.0), (rng.standard_normal((N, 16)), 0.4, 0.6)):
        (cell,) = bench("_cells").retrieval(task, {"half_a": half, "half_b": other}, targets)
        assert low <= cell["score"] <= high
        assert json.dumps(cell)


def test_what_an_exam_lacks_takes_the_mean_of_training_exams_and_what_all_lack_is_dropped(bench):
    gap = np.nan
    x = np.array([[1.0, 2.0, gap], [3.0, gap, gap], [gap, 9.0, gap], [gap, gap, gap]])
    found = bench("_features").completed(x, np.array([True, True, False, False]))
    assert found[:3].tolist() == [[1.0, 2.0], [3.0, 2.0], [2.0, 9.0]]
    assert np.isnan(found[3]).all()  # cannot be shown at all


def test_an_exam_is_described_sequence_by_sequence(bench, corpus):
    describe, inputs = bench("_describe"), bench("_inputs")
    exam = next(one for one in inputs.read(corpus, np.arange(len(corpus))) if not one.whole.present[0].all())
    present = set(exam.whole.sequence[0, exam.whole.present[0]].tolist())
    encoder = small_umbif().encoder
    for describer in (describe.Encoded(encoder), describe.Histogram(), describe.Raw()):
        found = describer(exam.whole, exam.places)
        slots = found.by_sequence.reshape(5, -1)
        for slot, name in enumerate(("t1", "t1ce", "t2", "flair", "other")):
            assert np.isfinite(slots[slot]).all() == (SEQUENCES.index(name) in present)
        assert len(found.together) == slots.shape[1]
        assert len(found.places) == len(exam.places)
        assert describer(exam.alone).places is None
    tokens = encoder.forward_features(exam.whole)[0][0]
    entry, place = inputs.tokens_of(patch_grid(exam.whole, inputs.PATCH))
    first = int(exam.whole.sequence[0, 0])
    own = describe.Encoded(encoder)(exam.whole, exam.places)
    mean = own.by_sequence.reshape(5, -1)[("t1", "t1ce", "t2", "flair").index(SEQUENCES[first]), : tokens.shape[1]]
    assert mean == pytest.approx(tokens[entry == 0].mean(0).detach().numpy(), abs=1e-5)
    assert own.places[3] == pytest.approx(tokens[place == exam.places[3]].mean(0).detach().numpy(), abs=1e-5)


def test_a_tumour_is_described_by_its_own_places(bench, corpus):
    describe, inputs = bench("_describe"), bench("_inputs")
    exams = list(inputs.read(corpus, np.arange(len(corpus))))
    ill = [exam for exam in exams if exam.tumour is not None]
    assert [corpus.exams["subject"][exam.row] for exam in ill] == ["P1", "P4"]
    exam, encoder = ill[0], small_umbif().encoder
    assert set(exam.places[exam.is_lesion]) <= set(exam.tumour)
    for describer in (describe.Encoded(encoder), describe.Histogram(), describe.Raw()):
        assert describer(exam.whole).tumour is None
        assert np.isfinite(describer(exam.whole, tumour=exam.tumour).tumour).any()
    tokens = encoder.forward_features(exam.whole)[0][0]
    entry, place = inputs.tokens_of(patch_grid(exam.whole, inputs.PATCH))
    inside = (entry == 0) & torch.isin(place, torch.from_numpy(exam.tumour))
    found = describe.Encoded(encoder)(exam.whole, tumour=exam.tumour).tumour.reshape(5, -1)
    slot = ("t1", "t1ce", "t2", "flair").index(SEQUENCES[int(exam.whole.sequence[0, 0])])
    assert found[slot] == pytest.approx(tokens[inside].mean(0).detach().numpy(), abs=1e-5)


def test_truth_has_no_tumour_of_the_healthy(bench):
    numbers = {name: [1.0, 100.0, 3.0] for name in bench("_features").TRAITS}
    truth = pd.DataFrame({**numbers, "healthy": [False, True, False], "age": [40, 50, 60]})
    found = bench("_features").traits_of(truth, np.array([True, True, True]))["whole"]
    assert found[:, :2].tolist() == [[40, 0], [50, 1], [60, 0]]
    assert found[:, 2:].tolist() == [[1.0] * 10, [2.0] * 10, [3.0] * 10]


def test_a_taught_network_answers_all_that_it_was_taught(bench, corpus):
    rows, supervised = np.arange(len(corpus)), bench("_supervised")
    exams = list(bench("_inputs").read(corpus, rows))
    about = {task.target: rows // 2 % 2 for task in supervised.LEARNT}
    targets = pd.DataFrame({"person": rows, "test": rows % 2 == 1, **about, "age": 50.0 + rows})
    course = supervised.Course(num_steps=40, lr=3e-3)
    model = supervised.teach(small_umbif().encoder, corpus, rows, targets, 0, course)
    with np.errstate(divide="ignore"):
        cells = list(bench("_finetuned").taught_cells(model, exams, targets))
    assert [(cell["task"], cell["probe"], cell["labels"]) for cell in cells] == [
        (task.name, "taught", 0) for task in supervised.LEARNT
    ]
    scores = {cell["task"]: cell["score"] for cell in cells}
    assert scores["idh"] == scores["lesion"] == 1.0
    assert scores["age"] > 0.5


def test_a_finetuned_encoder_learns_its_labels_in_their_units_and_the_given_one_stays(bench, corpus):
    tuned, rows = bench("_finetuned"), np.arange(len(corpus))
    exams = list(bench("_inputs").read(corpus, rows))
    targets = pd.DataFrame({"person": rows, "test": rows % 2 == 1, "idh": rows // 2 % 2, "log_lesion": 50.0 + rows})
    encoder = small_umbif().encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    (volume,) = [task for task in tuned.FINETUNED if task.kind == "number"]
    question = bench("_cells").question_of(volume, np.empty((len(rows), 0)), targets, {})
    course = bench("_supervised").Course(num_steps=60, lr=3e-3)
    seen = replace(question, is_test=np.ones(len(rows), dtype=bool))
    found = tuned.finetuned(encoder, corpus, exams, targets, seen, rows, 0, course)
    assert np.corrcoef(found, targets["log_lesion"])[0, 1] > 0.9
    assert found == pytest.approx(targets["log_lesion"].to_numpy(), abs=2.0)
    assert all(np.array_equal(before[name], value) for name, value in encoder.state_dict().items())
    short = bench("_supervised").Course(num_steps=1, lr=1e-3)
    with np.errstate(divide="ignore"):  # six test people: some resamples are of one alone
        cells = list(tuned.finetuned_cells(encoder, corpus, exams, targets, 0, short))
    assert [(cell["task"], cell["probe"], len(cell["draws"])) for cell in cells] == [
        ("lesion volume", "finetuned", 3), ("idh", "finetuned", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(("gain", "said"), [(0.10, "on 11 of 11 tasks"), (0.03, "on 0 of 11 tasks")])
def test_the_page_says_whether_the_aim_was_met(bench, tmp_path, gain, said):
    rng = np.random.default_rng(0)
    arms = ("histogram", "untrained", "mae", "contrast", "placebo")
    cells = [
        {"arm": arm, "seed": seed, "task": task.name, "probe": probe, "labels": num, "score": level,
         "resamples": (level + noise).tolist(), "draws": [level] * 3}
        for task in bench("_tasks").TASKS for noise in [rng.normal(0, 0.02, 40)]
        for probe, num in ([("cosine", 0)] if task.name == "retrieval" else PROBED)
        for arm, level in ((arm, 0.6 + gain * (arm == "umbif")) for arm in (*arms, "umbif")) for seed in range(3)
    ]  # fmt: skip
    source = {"arm": "umbif", "seed": 0, "commit": "0123abc", "hardware": "a CPU", "minutes": 2.0}
    bench("_cells").append(tmp_path / "learn.jsonl", [*cells, source, {**source, "seed": 1, "minutes": 4.0}])
    bench("_cells").append(tmp_path / "learn_first.jsonl", cells)
    other = [{**cell, "arm": "heavy", "score": cell["score"] - 0.2} for cell in cells if cell["arm"] == "umbif"]
    lower = [
        {**cell, **{name: [value - 0.2 for value in cell[name]] for name in ("resamples", "draws")}} for cell in other
    ]
    bench("_cells").append(tmp_path / "ablation.jsonl", [*cells, *lower])
    tried = {"about": "half the steps", "steps": 5000, "scores": {"age": 0.5}}  # the others were not kept
    (tmp_path / "tuning.jsonl").write_text(json.dumps(tried) + "\n")
    bench("evidence").main(["--results", str(tmp_path), "--docs", str(tmp_path)])
    page = (tmp_path / "evidence.md").read_text()
    assert f"| contrast weight .02 | {' | '.join(['**-0.20**'] * len(bench('_tasks').TASKS))} |" in page
    assert "| task |  | `histogram` | `untrained` | `placebo` | `mae` | `contrast` | `umbif` |" in page  # as declared
    assert said in page
    assert ("**not met**" in page) == (gain < 0.05)
    assert "| `umbif` | 0, 1 | 3 | 0123abc | a CPU |" in page
    assert "| half the steps | 5000 | – | 0.50 | – |" in page
    assert "{" not in page
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 3


@pytest.mark.parametrize("knows", [False, True])
def test_what_was_taught_every_label_lifts_no_task_from_chance_and_is_no_bound_where_it_knows_less(bench, knows):
    tables, levels = bench("_evidence_tables"), {"untrained": 0.45, "umbif": 0.47 + 0.1 * knows, "supervised": 0.9}
    cells = bench("_evidence").Cells(
        {"arm": arm, "task": "mgmt", "probe": probe, "labels": num, "seed": seed, "score": level,
         "resamples": [level] * 4, "draws": [level] * 3}
        for arm, own in levels.items() for seed in range(2)
        for probe, num, level in (("linear", 64, own), ("linear", 256, own), ("taught", 0, 0.46)) if arm == "supervised"
        or probe == "linear"
    )  # fmt: skip
    head, *rows = tables.scores(cells)
    assert head[-1] == "`supervised`\\*"
    row = ["mgmt", "AUC", "0.45", "0.57", "0.90"] if knows else ["mgmt, at chance", "AUC", "0.45", "0.47", "0.90"]
    assert row in rows
    said = "On mgmt they know less than the frozen hybrid: so few exams' labels alone are no upper bound."
    assert tables.unbounded(cells) == (said if knows else "")


def test_the_page_says_of_how_many_a_task_asks(bench):
    cells, targets = bench("_cells"), pd.DataFrame({
        "person": range(6), "test": [False, False, True, True, True, True], "ill": [1, 1, 1, 1, 0, 0],
        "mgmt": [0, 1, 1, np.nan, np.nan, 0],
    })  # fmt: skip
    for column in {task.target for task in bench("_tasks").TASKS} - {*targets} - {""}:
        targets[column] = 1.0
    features = {name: np.zeros((6, 2)) for name in ("whole", "alone", "tumour", "half_a", "half_b")}
    features |= {name: np.zeros((6, 8, 2)) for name in ("lesion", "flair")}  # eight patches of an exam
    places = {"is_lesion": np.ones((6, 8)), "flair": np.ones((6, 8, 2)), "position_mm": np.zeros((6, 8, 3))}
    counted = {line["task"]: line for line in cells.counts(features, targets, places)}
    assert counted["mgmt"] == {"task": "mgmt", "labelled": 2, "tested": 2, "positive": 1}
    assert counted["lesion patches"] == {"task": "lesion patches", "labelled": 16, "tested": 16, "positive": 16}
    assert counted["retrieval"] == {"task": "retrieval", "labelled": 0, "tested": 4}
    rows = [*bench("_evidence_tables").asked(counted.values())]
    assert ["mgmt", "Hidden biomarker, weak", "AUC", "0.5", "2", "2", "1"] in rows


def test_work_that_is_done_is_not_done_again_and_seeds_come_one_after_the_other(bench, tmp_path):
    learn = bench("learn")
    asked = ["--develop", "--folder", str(tmp_path), "--arms", "raw", "cnn", "mae", "--seeds", "100", "101", "102"]
    plan = learn.Plan.of(learn.arguments(asked))
    bench("_cells").append(plan.results, [{"arm": "cnn", "seed": 100, "task": "idh"}, {"arm": "mae", "seed": 101}])
    assert plan.works() == [("raw", 100), ("mae", 100), ("cnn", 101), ("mae", 102)]
    assert plan.works(finished=True) == [("cnn", 100), ("mae", 101)]
    assert plan._replace(seeds=[101]).works() == [("cnn", 101)]
    assert list(learn.Plan.of(learn.arguments(["--ablate"])).seeds) == [10, 11]  # of its own
    assert list(learn.Plan.of(learn.arguments([])).seeds) == [0, 1, 2, 3, 4]


def test_a_short_pretraining_tells_the_families_of_contrast_apart_better_than_none(bench, tmp_path):
    quick = bench("_quick")
    untrained, hybrid = (cell["score"] for cell in quick.quick_cells(tmp_path))
    assert hybrid - untrained >= quick.EXPECTED_GAIN


def test_what_is_done_once_more_is_compared_with_the_file(bench, tmp_path, capsys):
    learn, key = bench("learn"), {"task": "idh", "probe": "linear"}
    plan = learn.Plan.of(learn.arguments(["--develop", "--folder", str(tmp_path), "--arms", "mae", "--seeds", "3"]))
    known = [{"arm": "mae", "seed": 3, **key, "labels": num, "score": score} for num, score in ((16, 0.6), (64, 0.75))]
    bench("_cells").append(plan.results, known)
    again = Mock(cells=lambda *_: iter([{**key, "labels": 16, "score": 0.6}, {**key, "labels": 64, "score": 0.5}]))
    learn.verify(again, plan)
    assert "mae, seed 3: 1 of 2 the same, the largest difference 0.25" in capsys.readouterr().out


def test_nothing_is_verified_by_what_was_kept_of_it(bench, tmp_path, capsys):
    learn, asked = bench("learn"), ["--verify", "--develop", "--arms", "mae", "--folder", str(tmp_path)]
    learn.main(asked)
    assert "has none of these" in capsys.readouterr().out.replace("\n", " ")
    (tmp_path / "features_develop").mkdir()
    with pytest.raises(SystemExit, match="give --folder a new one"):
        learn.main(asked)


def test_an_arm_that_fails_does_not_hold_up_the_others(bench, tmp_path):
    learn = bench("learn")
    plan = learn.Plan.of(learn.arguments(["--develop", "--folder", str(tmp_path), "--arms", "mae", "umbif"]))
    plan = plan._replace(seeds=[100])

    def cells(arm, seed):
        if arm == "mae":
            raise learn.UmbifError("broken")
        yield {"task": "idh"}

    assert list(learn.run(Mock(cells=cells), plan, None)) == ["mae, seed 100"]
    assert plan.works() == [("mae", 100)]

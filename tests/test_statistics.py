"""Statistics against published numbers, brute force and simulation."""

import time
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from umbif.errors import UsageError
from umbif.evaluation import statistics as st
from umbif.evaluation.compare import compare_models
from umbif.evaluation.evaluate import evaluate, held_out
from umbif.evaluation.published import PUBLISHED, arithmetic, implied_range, matrices, measures_of, possible

# 113 patients of Turck et al. 2010 (doi 10.1007/s00134-009-1641-y), known as aSAH in the R package pROC (Robin et al.
# 2011, doi 10.1186/1471-2105-12-77): outcome poor (1), WFNS grade, S100B in hundredths of ug/L.
OUTCOME = (
    "0000110100101100101110100000000010011011000000000110001000101001110110111100011010000001000000000000"
    "1111110001000"
)
WFNS = (
    "1111325412525512522521111212113421454142551124112552125122215112521452441412142123242145115422111312"
    "5225552445111"
)
S100B = (
    "13 14 10 4 13 10 47 16 18 10 12 10 44 71 4 8 49 4 7 33 9 9 7 11 7 17 7 11 13 19 5 16 41 14 34 35 48 9 96 25 "
    "50 46 16 7 43 45 11 8 9 86 52 8 6 13 207 10 14 15 7 6 77 5 9 30 3 9 4 23 70 9 27 71 8 26 8 16 9 13 10 8 11 "
    "33 11 28 7 10 32 22 7 5 24 38 10 15 8 14 10 7 4 19 56 14 58 32 82 74 15 47 17 44 15 50 48 "
)
Y = np.array([int(c) for c in OUTCOME])
GRADES = np.array([int(c) for c in WFNS], dtype=float)
MARKER = np.array([int(c) for c in S100B.split()], dtype=float)


def draw(rng: np.random.Generator, n: int, strength: float, prevalence: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Labels with at least two of each class, and scores that know `strength` of them."""
    while True:
        y = (rng.random(n) < prevalence).astype(int)
        if 2 <= y.sum() <= n - 2:
            return y, expit(strength * y + rng.normal(size=n))


def table(y: np.ndarray, score: np.ndarray, model: str = "a", **columns: object) -> pd.DataFrame:
    n = len(y)
    base = {"exam": [f"e{i}" for i in range(n)], "person": [f"p{i}" for i in range(n)], "task": "idh", "model": model,
            "repeat": 0, "fold": 0, "seed": 0, "split": "test", "class": "mutant", "y": y, "score": score,
            "threshold": 0.5}  # fmt: skip
    return pd.DataFrame({**base, **columns})


# --- DeLong ---


def test_delong_agrees_with_the_numbers_of_proc() -> None:
    """Variances, covariance, P and interval as in pROC's own tests (test-var.R, test-cov.R, test-roc.test.R)."""
    areas, covariance = st.delong_covariance(Y, np.stack([GRADES, MARKER]))
    assert areas[1] == pytest.approx(0.7313685636856369, abs=1e-12)
    assert covariance[0, 0] == pytest.approx(0.00146991470882363, abs=1e-12)
    assert covariance[1, 1] == pytest.approx(0.00266868245717244, abs=1e-12)
    assert covariance[0, 1] == pytest.approx(0.00119615567376754, abs=1e-12)
    found = st.paired_delong(Y, GRADES, MARKER)
    assert found.p == pytest.approx(0.0271757822291882, abs=1e-10)
    assert (found.low, found.high) == pytest.approx((0.0104061769564846, 0.174214419249478), abs=1e-10)


def test_delong_agrees_with_structural_components_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    y = (rng.random(37) < 0.4).astype(int)
    scores = np.round(rng.normal(size=(3, 37)) + 0.5 * y, 1)  # rounding makes ties
    wins = [(s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0]) for s in scores]
    v10, v01 = np.array([w.mean(axis=1) for w in wins]), np.array([w.mean(axis=0) for w in wins])
    areas, covariance = st.delong_covariance(y, scores)
    np.testing.assert_allclose(areas, [w.mean() for w in wins])
    np.testing.assert_allclose(covariance, np.cov(v10) / y.sum() + np.cov(v01) / (1 - y).sum())


def test_delong_variance_is_near_that_of_the_bootstrap() -> None:
    y, score = draw(np.random.default_rng(2), 300, 1.0)
    frame = table(y, score)
    weights = np.random.default_rng(0).multinomial(300, np.full(300, 1 / 300), size=2000)
    assert np.var(st.weighted_auc(frame, weights)) == pytest.approx(st.delong_covariance(y, score)[1][0, 0], rel=0.15)


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_auc_equals_scikit_learn_with_ties(digits: int) -> None:
    for seed in range(10):
        y, score = draw(np.random.default_rng(seed), 60, 0.8)
        score = np.round(score, digits)
        expected = roc_auc_score(y, score)
        assert st.auc(y, score) == pytest.approx(expected, abs=1e-12)
        assert st.weighted_auc(table(y, score), np.ones((1, 60), int))[0] == pytest.approx(expected, abs=1e-12)


def test_weighted_auc_is_the_auc_of_the_resample() -> None:
    rng = np.random.default_rng(3)
    y, score = draw(rng, 40, 0.5)
    score = np.round(score, 1)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=5)
    expected = [roc_auc_score(np.repeat(y, w), np.repeat(score, w)) for w in weights]
    np.testing.assert_allclose(st.weighted_auc(table(y, score), weights), expected)


def test_logit_delong_covers_nine_in_ten_where_plain_delong_covers_eight() -> None:
    """n = 50, prevalence 0.1, three true AUCs; 600 simulations have a standard error of 1.1%."""
    rng = np.random.default_rng(4)
    on_logit_scale, plain = [], []
    for strength in (0.0, 1.0, 2.0):
        truth = norm.cdf(strength / np.sqrt(2))
        for _ in range(200):
            y, score = draw(rng, 50, strength, 0.1)
            found = st.auc_interval(y, score)
            areas, covariance = st.delong_covariance(y, score)
            on_logit_scale.append(found.low <= truth <= found.high)
            plain.append(abs(areas[0] - truth) <= 1.96 * np.sqrt(covariance[0, 0]))
    assert np.mean(on_logit_scale) >= 0.89
    assert np.mean(plain) <= 0.85


def test_perfect_separation_never_claims_certainty() -> None:
    y, score = np.repeat([0, 1], 6), np.linspace(0, 1, 12)
    found = st.auc_interval(y, score)
    assert found.value == 1.0
    assert found.low == pytest.approx(6 / (6 + 1.959964**2))  # Wilson's lower limit of 6 of 6
    assert st.auc_interval(y, 1 - score).high == pytest.approx(1 - found.low)
    assert st.auc_interval(y, np.full(12, 0.3)).value == 0.5
    assert st.auc_interval([0, 0, 0, 1], [0.1, 0.9, 0.3, 0.5]).low < 0.2
    assert np.isnan(st.auc_interval([1, 1], [0.2, 0.3]).value)


def test_p_against_chance_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(5)
    p = np.array([st.auc_p_against_chance(*draw(rng, 40, 0.0, 0.15)) for _ in range(400)])
    assert 0.02 <= np.mean(p < 0.05) <= 0.08
    assert st.auc_p_against_chance([0, 1, 1], [0.5, 0.5, 0.5]) == 1.0


def test_equal_scores_give_p_one_and_the_sign_of_a_difference_is_kept() -> None:
    y, score = draw(np.random.default_rng(6), 50, 2.0)
    noise = np.random.default_rng(7).random(50)
    assert st.paired_delong(y, score, score) == st.Difference(0.0, 0.0, 0.0, 1.0)
    assert st.paired_delong(y, score, score**3).p == 1.0
    forth, back = st.paired_delong(y, score, noise), st.paired_delong(y, noise, score)
    assert forth.value > 0
    assert (back.value, back.low) == pytest.approx((-forth.value, -forth.high))


# --- bootstrap over persons ---


def test_duplicated_exams_of_a_person_do_not_narrow_the_interval() -> None:
    y, score = draw(np.random.default_rng(8), 60, 1.0)
    once = table(y, score)
    thrice = pd.concat([once.assign(exam=once["exam"] + f"/{k}") for k in range(3)])
    a, b = (st.person_bootstrap(frame, st.weighted_auc) for frame in (once, thrice))
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=1e-12)
    independent = st.person_bootstrap(thrice.assign(person=thrice["exam"]), st.weighted_auc)
    assert independent.high - independent.low < 0.7 * (b.high - b.low)


def test_resamples_without_a_class_are_counted() -> None:
    y = np.array([1] + [0] * 19)
    found = st.person_bootstrap(table(y, np.linspace(0, 1, 20)), st.weighted_auc)
    assert found.num_used + found.num_skipped == 2000
    assert found.num_skipped / 2000 == pytest.approx((19 / 20) ** 20, abs=0.04)


def test_2000_resamples_of_100_exams_take_less_than_a_second() -> None:
    y, score = draw(np.random.default_rng(9), 100, 1.0)
    start = time.perf_counter()
    st.person_bootstrap(table(y, score), st.weighted_auc)
    assert time.perf_counter() - start < 1.0


def test_auc_within_data_sets_is_that_of_their_pairs_in_every_resample() -> None:
    rng = np.random.default_rng(21)
    y, score = draw(rng, 60, 0.5)
    frame = table(y, np.round(score, 1), dataset=rng.choice(["a", "b", "c"], 60))
    weights = rng.multinomial(60, np.full(60, 1 / 60), size=5)
    for drawn, found in zip(weights, st.within_auc(frame, weights), strict=True):
        resample = frame.loc[np.repeat(frame.index, drawn)]
        pairs = resample[resample["y"] == 1].merge(resample[resample["y"] == 0], on="dataset")
        won = (pairs["score_x"] > pairs["score_y"]) + 0.5 * (pairs["score_x"] == pairs["score_y"])
        assert found == pytest.approx(won.mean())


# --- calls ---


def test_wilson_interval_of_newcombes_example() -> None:
    """81 of 263, Newcombe 1998 (doi 10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), Table I."""
    found = st.proportion(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_holm_of_a_known_family() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.01, float("nan")])[0] == pytest.approx(0.01)


def test_measures_of_known_calls_and_dashes_for_0_of_0() -> None:
    y = np.array([1] * 8 + [0] * 34)
    call = np.array([1] * 7 + [0] + [1] * 14 + [0] * 20)
    found = st.call_measures(table(y, call, call=call))
    assert (found.true_positive, found.false_positive) == (7, 14)
    assert found.accuracy.value == pytest.approx(27 / 42)
    assert found.f1.value == pytest.approx(14 / 29)
    assert found.f1.low < 14 / 29 < found.f1.high
    never = st.call_measures(table(y, call, call=np.zeros(42, int)))
    assert np.isnan(never.ppv.value)
    assert never.npv.value == pytest.approx(34 / 42)
    assert st.majority_baseline(y) == pytest.approx(34 / 42)


def test_accuracy_of_the_majority_call_does_not_beat_the_baseline() -> None:
    assert st.p_against_baseline(34, 42, 34 / 42) > 0.5
    assert st.p_against_baseline(42, 42, 34 / 42) == pytest.approx((34 / 42) ** 42)


# --- calibration ---


def test_calibration_finds_the_slope_and_intercept_that_were_put_in() -> None:
    rng = np.random.default_rng(10)
    line = rng.normal(size=4000)
    y = (rng.random(4000) < expit(line)).astype(int)
    honest, extreme, high = (st.calibration(y, expit(x)) for x in (line, 2 * line, line + 1))
    assert honest.slope.low < 1 < honest.slope.high
    assert honest.intercept.low < 0 < honest.intercept.high
    assert extreme.slope.value == pytest.approx(0.5, abs=0.06)
    assert high.intercept.value == pytest.approx(-1, abs=0.1)
    assert honest.ece < 0.03 < high.ece
    assert honest.brier < honest.brier_prevalence


def test_calibration_without_a_solution_is_nan_and_constant_scores_form_one_bin() -> None:
    assert np.isnan(st.calibration([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]).slope.value)
    curve = st.calibration_curve([0, 1, 1, 1], [0.5] * 4)
    assert curve["num"].tolist() == [4]
    assert curve["observed"].tolist() == [0.75]


# --- from predictions to results ---


def test_only_test_rows_count_and_fits_of_one_model_are_averaged() -> None:
    y, score = draw(np.random.default_rng(11), 80, 1.0)
    val = table(1 - y, score, split="val", person="v", exam="v")
    seeds = [table(y, np.clip(score + shift, 0, 1), seed=k) for k, shift in enumerate((-0.001, 0.001))]
    (result,) = evaluate(pd.concat([val, *seeds]))
    assert (result.num_exams, result.num_positive) == (80, y.sum())
    assert result.auc.value == pytest.approx(roc_auc_score(y, score))
    assert not result.few
    assert not result.pooled
    assert result.p_holm == result.p_chance


def test_few_and_pooled_exams_are_flagged() -> None:
    y = np.array([1] * 9 + [0] * 30)
    (result,) = evaluate(table(y, np.linspace(0, 1, 39), fold=np.arange(39) % 3))
    assert result.few
    assert result.pooled


def two_hospitals(strength: float, recognises: float, seed: int = 0, **columns: object) -> pd.DataFrame:
    """IDH of UCSF-PDGM (103 of 501 mutant) and UPENN-GBM (19 of 563), all test, and a quarter as many in validation."""
    rng = np.random.default_rng(22 + seed)
    parts = []
    for split, share in (("test", 1.0), ("val", 0.25)):
        sizes = [(round(share * mutant), round(share * exams)) for mutant, exams in ((103, 501), (19, 563))]
        y = np.concatenate([np.arange(exams) < mutant for mutant, exams in sizes]).astype(int)
        dataset = np.repeat(["ucsf", "upenn"], [exams for _, exams in sizes])
        score = expit(strength * y + recognises * (dataset == "ucsf") + rng.normal(size=len(y)))
        names = [f"{split}{i}" for i in range(len(y))]
        parts.append(table(y, score, exam=names, person=names, dataset=dataset, split=split, seed=seed, **columns))
    return pd.concat(parts, ignore_index=True)


def test_recognising_the_hospital_is_not_better_than_chance_and_knowing_the_tumour_is() -> None:
    (found,) = evaluate(two_hospitals(0.0, 2.0))
    assert found.p_holm < 1e-6
    assert found.auc_bootstrap.low > 0.6
    assert found.auc_of_dataset == pytest.approx(0.711, abs=5e-4)
    assert found.auc_within.low < 0.5 < found.auc_within.high
    assert found.against_chance == "neither"
    assert (found.num_datasets, found.lowest_prevalence) == (2, pytest.approx(19 / 563))
    (found,) = evaluate(two_hospitals(1.5, 2.0))
    assert found.against_chance == "better"
    assert found.auc_within.value == pytest.approx(norm.cdf(1.5 / np.sqrt(2)), abs=0.04)
    (found,) = evaluate(two_hospitals(-1.5, -2.0))
    assert found.against_chance == "worse"


def test_without_names_of_data_sets_all_exams_are_of_one() -> None:
    (found,) = evaluate(two_hospitals(1.5, 0.0).drop(columns="dataset"))
    assert found.num_datasets == 1
    assert np.isnan([found.auc_of_dataset, found.auc_within.value]).all()
    assert found.against_chance == "better"


def test_nothing_is_claimed_where_each_data_set_has_one_class_or_one_person_of_it() -> None:
    y = np.repeat([1, 0], [40, 41])
    score = np.where(y == 1, 0.9, 0.1) + np.linspace(-0.1, 0.1, 81)
    (apart,) = evaluate(table(y, score, dataset=np.where(y == 1, "a", "b")))
    assert np.isnan(apart.auc_within.value)
    (one,) = evaluate(table(y, score, dataset=np.where(np.arange(81) > 0, np.where(y == 1, "a", "b"), "b")))
    assert one.auc_within.value == 1.0
    assert one.auc_within.low < 0.5
    assert {apart.against_chance, one.against_chance} == {"neither"}


def test_a_data_set_that_validation_does_not_know_gets_the_share_of_all_and_fits_are_averaged() -> None:
    def known(exams: pd.DataFrame) -> float:
        return evaluate(exams)[0].auc_of_dataset

    exams = two_hospitals(0.0, 0.0)
    in_val = exams["split"] == "val"
    assert np.isnan(known(exams[~in_val]))
    assert np.isnan(known(exams[~in_val | (exams["dataset"] == "ucsf")]))
    # A third data set with fewer mutants than either: taken for the mean of both, it comes between them.
    third = exams[~in_val].assign(
        dataset="third", y=0, exam=lambda x: x["exam"] + "c", person=lambda x: x["person"] + "c"
    )
    with_third = held_out(pd.concat([exams, third])).groupby("dataset")["share_of_dataset"].first()
    assert with_third["upenn"] < with_third["third"] == pytest.approx(exams.loc[in_val, "y"].mean())
    assert with_third["third"] < with_third["ucsf"]
    turned = two_hospitals(0.0, 0.0, seed=1)
    turned.loc[turned["split"] == "val", "dataset"] = turned["dataset"].map({"ucsf": "upenn", "upenn": "ucsf"})
    assert known(pd.concat([exams, turned])) == pytest.approx(0.5, abs=1e-9)


def test_many_exams_of_few_persons_are_few_and_not_better_than_chance() -> None:
    """Each person's exams are alike: 3 persons with a positive exam, of 6, are no 30 of 60."""
    y, person = np.repeat([1, 0], 30), np.repeat([f"p{i}" for i in range(6)], 10)
    score = np.repeat([0.9, 0.8, 0.2, 0.7, 0.15, 0.1], 10)
    (found,) = evaluate(table(y, score, person=person))
    assert found.p_holm < 0.01
    assert found.few
    assert found.against_chance == "neither"


def test_the_mean_of_five_fits_and_a_single_one_are_not_compared_and_its_fits_are_told() -> None:
    y, score = draw(np.random.default_rng(23), 120, 2.5)
    noise = np.random.default_rng(24).random((6, 120))
    five = [table(y, score / 2 + noise[k] / 2, "five", seed=k) for k in range(5)]
    frame = pd.concat([*five, table(y, noise[5], "one")])
    found = compare_models(frame, "idh", "one", "five")
    assert (found.fits_a, found.fits_b) == (1, 5)
    assert found.difference.high < 0
    assert not found.shown
    assert found.words == "five is the mean of 5 fits, one of 1: not alike, so no difference is shown."
    ensemble, single = evaluate(frame)
    alone = [roc_auc_score(y, fit["score"]) for fit in five]
    assert (ensemble.lowest_fit_auc, ensemble.highest_fit_auc) == pytest.approx((min(alone), max(alone)))
    assert np.isnan(single.lowest_fit_auc)


def test_folds_that_share_the_exams_among_them_are_one_fit() -> None:
    y, score = draw(np.random.default_rng(25), 60, 1.0)
    seeds = [table(y, score**power, fold=np.arange(60) % 3, seed=power) for power in (1, 2)]
    (found,) = evaluate(pd.concat(seeds))
    assert (found.num_fits, found.pooled) == (2, True)
    assert (found.lowest_fit_auc, found.highest_fit_auc) == pytest.approx((roc_auc_score(y, score),) * 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "train"}, "no row of split"),
        ({"score": 1.5}, "outside of 0 to 1"),
        ({"y": 2}, "labels other than"),
        ({"exam": "same"}, "more than once"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change: dict, words: str) -> None:
    y, score = draw(np.random.default_rng(12), 20, 1.0)
    with pytest.raises(UsageError, match=words):
        held_out(table(y, score).assign(**change))


def test_a_person_in_validation_and_test_is_refused() -> None:
    y, score = draw(np.random.default_rng(13), 20, 1.0)
    test = table(y, score)
    with pytest.raises(UsageError, match="both validation and test"):
        evaluate(pd.concat([test, test.head(3).assign(split="val", exam="other")]))


def test_models_are_compared_on_the_exams_that_both_scored() -> None:
    rng = np.random.default_rng(14)
    y, score = draw(rng, 120, 2.5)
    frame = pd.concat([table(y, score, "a"), table(y, rng.random(120), "b").iloc[10:]])
    found = compare_models(frame, "idh", "a", "b")
    assert (found.num_exams, found.num_left_out) == (110, 10)
    assert found.difference.value == pytest.approx(found.auc_a - found.auc_b)
    assert found.bootstrap.low == pytest.approx(found.difference.low, abs=0.03)
    assert found.bootstrap.high == pytest.approx(found.difference.high, abs=0.03)
    assert found.shown
    assert not compare_models(frame, "idh", "b", "b").shown
    assert compare_models(frame, "idh", "b", "b").p_mcnemar == 1.0
    with pytest.raises(UsageError, match="Did you mean idh"):
        compare_models(frame, "idhh", "a", "b")


# --- the published figures ---


def test_no_four_of_the_printed_progression_values_fit_one_matrix() -> None:
    figures = PUBLISHED[0].figures
    assert not any(possible({n: figures[n] for n in four}) for four in combinations(figures, 4))
    assert all(possible({n: figures[n] for n in three}) for three in combinations(figures, 3))
    found = arithmetic()
    assert found.npv_range == pytest.approx((0.127, 0.143), abs=5e-4)
    assert found.smallest_matrix == {"tp": 377, "fp": 4, "fn": 42, "tn": 7}
    assert found.cerebral_matrices == [{"tp": 7, "fp": 14, "fn": 1, "tn": 20}]
    assert found.imagenet_matrices == [{"tp": 2, "fp": 9, "fn": 6, "tn": 25}]


def test_the_search_finds_a_matrix_that_exists() -> None:
    cells = {"tp": 21, "fp": 5, "fn": 4, "tn": 13}
    printed = {name: round(value, 3) for name, value in measures_of(cells).items()}
    assert possible(printed)
    assert cells in list(matrices(printed, 25, 18))
    low, high = implied_range({n: printed[n] for n in ("specificity", "ppv", "f1")}, "npv")
    assert low <= measures_of(cells)["npv"] <= high

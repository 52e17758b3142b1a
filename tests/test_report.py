"""The report page and its pictures."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from umbif.errors import UsageError
from umbif.evaluation.report import write_report
from umbif.evaluation.statistics import Estimate, auc_interval
from umbif.evaluation.words import interval, number, p_value
from umbif.pages.page import data_uri, render, svg, write_page
from umbif.pages.pictures import MASKED, three_planes

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
)


def predictions(model: str, strength: float, seed: int, n: int = 80) -> pd.DataFrame:
    truth, rng = np.random.default_rng(99), np.random.default_rng(seed)
    y = (truth.random(n) < 0.4).astype(int)
    names = [f"d/s{i:03d}" for i in range(n)]
    return pd.DataFrame(
        {"exam": names, "person": names, "dataset": "d", "site": "d", "task": "IDH mutation", "model": model,
         "repeat": 0, "fold": 0, "seed": 0, "split": "test", "class": "IDH mutant", "y": y,
         "score": expit(strength * (2 * y - 1) + rng.normal(size=n)), "threshold": 0.5, "time": np.nan, "event": np.nan}
    )  # fmt: skip


def run(folder: Path, *tables: pd.DataFrame) -> Path:
    folder.mkdir(parents=True)
    pd.concat(tables).to_parquet(folder / "predictions.parquet")
    (folder / "recipe.yaml").write_text("seed: 20 # <b>bold</b>\n")
    return folder


class Loads(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        self.found += [tag] if tag in ("script", "iframe", "link", "object", "embed") else []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    picture = folder / "a.png"
    picture.write_bytes(PNG)
    one, two = predictions("pretrained", 0.8, 1), predictions("untrained", 0.75, 2)
    runs = [run(folder / "one", one), run(folder / "two", two)]
    cohort = {"volumes": 1204, "exams": 320, "persons": 301, "quarantined": {"truncated": 3}, "split": {"test": 80}}
    return write_report(runs, folder / "out" / "page.html", title="A & B", notes=["These exams are synthetic."],
                        figures=[("A picture.", picture)], cohort=cohort)  # fmt: skip


def test_the_page_loads_nothing(page: Path) -> None:
    html = page.read_text()
    loads = Loads()
    loads.feed(html)
    assert [found for found in loads.found if not found.startswith(("data:image/png;base64,", "#"))] == []
    assert not re.search(r"https?://|url\((?!#)|@import", html)


def test_the_page_and_its_tables_hold_the_right_numbers(page: Path) -> None:
    html, table = page.read_text(), predictions("pretrained", 0.8, 1)
    expected = auc_interval(table["y"], table["score"])
    accuracy = ((table["score"] >= 0.5) == table["y"]).mean()
    for shown in (number(expected.value), interval(expected), number(accuracy), f"{table['y'].sum()} positive"):
        assert shown in html
    rows = pd.read_csv(page.parent / "page_tables" / "results.csv")
    assert rows["model"].tolist() == ["pretrained", "untrained"]
    assert rows["auc_value"][0] == pytest.approx(roc_auc_score(table["y"], table["score"]))
    assert rows["measures_accuracy_value"][0] == pytest.approx(accuracy)
    assert len(pd.read_csv(page.parent / "page_tables" / "comparisons.csv")) == 1


def test_the_page_says_first_what_limits_it_and_escapes_what_others_wrote(page: Path) -> None:
    html = page.read_text()
    assert html.index("These exams are synthetic.") < html.index("Results on held-out exams")
    assert "A &amp; B" in html
    assert "<b>bold</b>" not in html
    assert "1,204" in html
    assert "internally inconsistent" in html
    assert "0.127 and 0.143" in html


def test_the_page_tells_when_no_difference_and_nothing_beyond_chance_was_shown(page: Path, tmp_path: Path) -> None:
    assert "No difference between models was shown." in page.read_text()
    null = run(tmp_path / "null", predictions("pretrained", 0.0, 3))
    html = write_report([null], tmp_path).read_text()
    assert "pretrained did not show more than chance on IDH mutation." in html
    assert "Models compared" not in html


def test_the_page_tells_when_a_difference_was_shown(tmp_path: Path) -> None:
    both = run(tmp_path / "run", predictions("pretrained", 1.5, 1), predictions("untrained", 0.0, 2))
    html = write_report([both], tmp_path).read_text()
    assert "The AUC of pretrained was higher than that of untrained, by " in html
    assert "No difference between models was shown." not in html


def test_fits_of_one_recipe_are_averaged_and_told_and_of_two_recipes_refused(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"seed{seed}", predictions("pretrained", 1.0, seed).assign(seed=seed)) for seed in (1, 2)]
    for folder, seed in zip(runs, (1, 2), strict=True):
        (folder / "recipe.yaml").write_text(f"run: {{seed: {seed}}}\nmodel: {{lr: 0.1}}\ndata: {{seed: {seed}}}\n")
    html = write_report(runs, tmp_path / "ensemble.html").read_text()
    assert "pretrained on IDH mutation is an ensemble: each score is the mean of 2 fits." in html
    aucs = sorted(roc_auc_score(t["y"], t["score"]) for t in (predictions("pretrained", 1.0, s) for s in (1, 2)))
    assert f"Each alone, these have AUCs from {number(aucs[0])} to {number(aucs[1])}." in html
    (runs[1] / "recipe.yaml").write_text("run: {seed: 2}\nmodel: {lr: 0.2}\ndata: {seed: 2}\n")
    with pytest.raises(UsageError, match=r"fits of pretrained on IDH mutation differ in model\.lr: got seed1, seed2"):
        write_report(runs, tmp_path / "ensemble.html")


def test_fits_are_of_one_model_where_their_corpora_are_one_wherever_they_lie(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"seed{seed}", predictions("pretrained", 1.0, seed).assign(seed=seed)) for seed in (1, 2)]

    def tell(folder: Path, disk: str, identity: str, labels: str = "labels.csv") -> None:
        (folder / "recipe.yaml").write_text(f"data: {{corpus: {disk}/corpus, labels: {disk}/{labels}}}\n")
        (folder / "encoder").mkdir(exist_ok=True)
        (folder / "encoder" / "config.json").write_text(f'{{"corpus": "{identity}"}}')

    tell(runs[0], "job.1", "abc")
    tell(runs[1], "job.2", "abc")
    assert "mean of 2 fits" in write_report(runs, tmp_path / "page.html").read_text()
    tell(runs[1], "job.1", "def")
    with pytest.raises(UsageError, match="fits of pretrained on IDH mutation differ in corpus: got seed1, seed2"):
        write_report(runs, tmp_path / "page.html")
    tell(runs[1], "job.1", "abc", "other.csv")
    with pytest.raises(UsageError, match=r"differ in data\.labels"):
        write_report(runs, tmp_path / "page.html")


def hospitals(model: str, strength: float, seed: int) -> pd.DataFrame:
    """Two data sets, of which the second has few mutants, and a model that knows which is which."""
    parts = []
    for name, share in (("a", 0.0), ("b", 0.8)):
        for split in ("val", "test"):
            part = predictions(model, strength, seed + len(parts), n=120).assign(dataset=name, split=split)
            rare = np.random.default_rng(seed + len(parts)).random(120) < share
            part["y"] = part["y"].where(~rare, 0)
            part["score"] = expit(
                strength * part["y"] + np.random.default_rng(len(parts)).normal(size=120) + 2 * (name == "a")
            )
            part["exam"] = part["person"] = f"{name}/{split}/" + part["exam"]
            parts.append(part)
    return pd.concat(parts)


def test_a_task_of_several_data_sets_says_what_knowing_them_alone_would_give(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, hospitals(name, strength, 1)) for name, strength in (("knows", 2.0), ("guesses", 0.0))]
    html = write_report(runs, tmp_path).read_text()
    rows = pd.read_csv(tmp_path / "report_tables" / "results.csv").set_index("model")
    assert rows["against_chance"].tolist() == ["better", "neither"]
    assert (rows["p_holm"] < 0.05).all()
    guess = rows.loc["guesses"]
    shares = f"{100 * guess['lowest_prevalence']:.0f}% to {100 * guess['highest_prevalence']:.0f}% positive"
    within = (
        f"guesses has {guess['auc_within_value']:.2f} ({guess['auc_within_low']:.2f}–{guess['auc_within_high']:.2f})."
    )
    assert f"IDH mutation: exams of 2 data sets, {shares}." in html
    assert f"Knowing only the data set gives AUC {guess['auc_of_dataset']:.2f}; within data sets knows has " in html
    assert within in html
    assert "knows did better than chance on IDH mutation; guesses did not show more than chance" in html
    assert "The AUC within data sets counts only pairs" in html


def test_a_task_whose_data_sets_have_one_class_each_says_that_nothing_can_be_claimed(tmp_path: Path) -> None:
    apart = predictions("pretrained", 3.0, 1).assign(dataset=lambda x: np.where(x["y"] == 1, "a", "b"))
    html = write_report([run(tmp_path / "run", apart)], tmp_path).read_text()
    assert "No data set has both classes, so nothing is said to be better than chance." in html
    assert "cannot be told without validation exams" in html
    assert "pretrained did not show more than chance on IDH mutation." in html


def test_the_page_does_not_judge_a_mean_of_fits_against_a_single_one(tmp_path: Path) -> None:
    fits = [predictions("pretrained", 1.5, seed).assign(seed=seed) for seed in (1, 2)]
    both = run(tmp_path / "run", *fits, predictions("untrained", 0.0, 3))
    html = write_report([both], tmp_path).read_text()
    assert "pretrained is the mean of 2 fits, untrained of 1: not alike" in html
    assert "Nothing is said of 1 of 1 comparisons: their models are means of unlike numbers of fits." in html
    assert "difference between models was shown" not in html


def test_a_page_without_comparisons_leaves_none_of_the_page_before(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, predictions(name, 1.0, 1)) for name in ("one", "two"))
    html = write_report([one, two], tmp_path).read_text()
    assert "Those of McNemar&#39;s test are not adjusted" in html
    assert (tmp_path / "report_tables" / "comparisons.csv").exists()
    write_report([one], tmp_path)
    assert sorted(path.name for path in (tmp_path / "report_tables").iterdir()) == ["published.csv", "results.csv"]


def test_two_reports_in_one_folder_keep_their_tables(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, predictions(name, 1.0, 1)) for name in ("one", "two"))
    pages = [write_report([folder], tmp_path / f"{folder.name}.html") for folder in (one, two)]
    for page in pages:
        table = pd.read_csv(tmp_path / f"{page.stem}_tables" / "results.csv")
        assert table["model"].tolist() == [page.stem]
        assert f"{page.stem}_tables/" in page.read_text()


def test_a_run_without_predictions_names_the_verbs_that_make_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no predictions\.parquet.*umbif fit"):
        write_report([tmp_path], tmp_path / "page.html")


def test_a_run_that_does_not_exist_is_told_with_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "runs" / "idh").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").write_text("")
    for given, said in {
        "runs/ihd": r"There is no such folder: got .*runs/ihd\. Did you mean idh\?",
        "rns/idh": r"There is no such folder: got .*rns/idh\. Did you mean runs\?",
        "runs/mgmt": r"There is no such folder: got .*runs/mgmt$",
        "runs/notes.txt": "A run is a folder, and this is a file",
    }.items():
        with pytest.raises(UsageError, match=said):
            write_report([tmp_path / given], tmp_path / "page.html")


def test_a_file_of_another_origin_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "page.html"
    mine.write_text("my notes")
    with pytest.raises(UsageError, match="did not write"):
        write_page(mine, "<html>")
    assert mine.read_text() == "my notes"
    other = tmp_path / "other.html"
    html = write_page(write_page(other, '<meta name="generator" content="UMBIF">1'), "2").read_text()
    assert html == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "page.html"]


def test_numbers_are_printed_as_in_journals() -> None:
    assert [number(float("nan")), number(-0.1234), p_value(0.0), p_value(0.0437), p_value(0.37)] == [
        "–", "−0.123", "<0.001", "0.044", "0.37"]  # fmt: skip
    assert interval(Estimate(0.0, -0.05, 0.12)) == "−0.050 to 0.120"
    assert interval(Estimate(0.8, 0.74, 0.885)) == "0.740–0.885"
    assert interval(Estimate(0.8)) == "–"


def test_a_template_without_its_values_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        render("report.html.j2", title="x")


# --- pictures ---


def shown(figure: object) -> list[np.ndarray]:
    return [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes]  # type: ignore[attr-defined]


def test_planes_are_hung_as_radiologists_do() -> None:
    brain = np.zeros((6, 8, 10), dtype=np.float32)
    brain[5, 7, 9] = 1.0  # the patient's right, front, top
    axial, coronal, sagittal = shown(three_planes([("a", brain)], center=(5, 7, 9)))
    assert (axial.shape, coronal.shape, sagittal.shape) == ((8, 6), (10, 6), (10, 8))
    for plane in (axial, coronal, sagittal):
        assert plane[0, 0] == 1.0  # top left: front or top, and right or front


def test_masked_voxels_are_grey_and_the_window_can_be_shared() -> None:
    brain = np.linspace(0, 100, 6 * 8 * 10).reshape(6, 8, 10)
    masked = brain / 10
    masked[:, :, 5] = np.nan
    figure = three_planes([("input", brain), ("masked", masked)], shared_window=True, overlays=[brain > 50, None])
    assert np.isnan(shown(figure)[3]).all()
    assert figure.axes[0].images[0].get_clim() == figure.axes[3].images[0].get_clim()
    own = three_planes([("input", brain), ("masked", masked)])
    assert own.axes[0].images[0].get_clim() != own.axes[3].images[0].get_clim()
    from matplotlib.colors import to_hex

    assert to_hex(figure.axes[3].images[0].cmap.get_bad()) == MASKED
    with pytest.raises(ValueError, match="one shape"):
        three_planes([("a", brain), ("b", brain[1:])])


def test_figures_become_labelled_svg_without_addresses() -> None:
    text = svg(three_planes([("a <b>", np.random.default_rng(0).random((6, 8, 10)))]), 'planes "1"')
    assert text.startswith('<svg role="img" aria-label="planes &#34;1&#34;"')
    assert "http" not in text
    assert "a &lt;b&gt;" in text


def test_only_pictures_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="Not a picture"):
        data_uri(tmp_path / "a.txt")

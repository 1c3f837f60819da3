"""The page for readers: its content, and how a browser shows it."""

import re
import shutil
import sys
from html.parser import HTMLParser

import keras
import numpy as np
import pytest
from keras import layers

from keras_drsl import MinimalDistances, RobustnessReport, compare, evaluate_robustness, robustness_curve
from keras_drsl.attacks import APGD
from keras_drsl.evaluation import Check, html
from tests.linear import inputs, linear_model

pytest.importorskip("jinja2")
pytest.importorskip("PIL")

EVIL = "<script>alert(1)</script>\u202e & \x1b[2J"


class Page(HTMLParser):
    """The text of a page by section, its tags, and what it asks for elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.requests, self.sections, self._path = [], [], {"": ""}, []
        self._title = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._path.append(tag)
        if tag == "h2":
            self._title = ""
        for name, value in attributes:
            if name in ("src", "href", "data", "action", "srcset") and not value.startswith("data:"):
                self.requests.append(value)

    def handle_endtag(self, tag):
        while self._path and self._path.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self._path:
            return
        if "h2" in self._path:
            self._title += data
            self.sections[self._title] = ""
        else:
            self.sections[self._title] = self.sections.get(self._title, "") + " " + " ".join(data.split())

    def __getitem__(self, title):
        return " ".join(self.sections[title].split())


def images():
    """Return a model of images, images and labels, some of which are wrong."""
    x, y = inputs(60)
    model = keras.Sequential([keras.Input((2, 2, 1)), layers.Flatten(), linear_model()])
    return model, x.reshape(-1, 2, 2, 1), np.where(np.arange(60) % 20 == 0, (y + 1) % 3, y)


def evaluate(model, x, y):
    attacks = [APGD(0.1, loss="margin", targeted=True, steps=20)]
    checks = ["clean_accuracy", "noise"]
    return evaluate_robustness(model, x, y, eps=0.1, attacks=attacks, checks=checks, keep_examples=True, verbose=0)


@pytest.fixture(scope="module")
def report():
    return evaluate(*images())


@pytest.fixture(scope="module")
def other_report():
    """Return the report of another model of the same images."""
    model, x, y = images()
    kernel, bias = model.get_weights()
    model.set_weights([kernel + np.random.default_rng(1).normal(0, 0.5, kernel.shape), bias])
    return evaluate(model, x, y)


@pytest.fixture(scope="module")
def path(report, other_report, tmp_path_factory):
    """Return the file of a page with all sections."""
    path = tmp_path_factory.mktemp("html") / "report.html"
    curve = robustness_curve(*images(), eps=[0, 0.05, 0.1, 0.2], suite="quick", checks=[], verbose=0)
    report.checks.append(Check("units", "warn", 0.3, "eps is small"))
    distances = MinimalDistances([0.0, 0.125, 0.25, 0.5], np.zeros((4, 2)), range(4), {"norm": 2})
    comparison = [compare(report, other_report, names=("the model", name)) for name in ("other", "third")]
    options = {"curve": curve, "distances": distances, "comparison": comparison}
    report.to_html(path, title="the model", **options)
    report.checks.pop()
    return path


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_verdict_is_a_sentence_with_units(report, page):
    robust, clean = 100 * report.robust_accuracy, 100 * report.clean_accuracy
    expected = (
        f"Of 60 test examples, the model gets {clean:.1f} % right, and still {robust:.1f} % if an attacker changes"
    )
    assert expected + " every input value by at most 0.1 on a scale from 0 to 1." in page[""]
    assert "Robustness report the model Of 60" in page[""]
    low, high = report.confidence_interval
    assert f"{robust:.1f} % robust accuracy 95 % interval {100 * low:.1f} % to {100 * high:.1f} %" in page[""]


def test_checks_that_did_not_pass_say_what_to_do(page):
    expected = "3 of 4 checks passed (1 with a warning). The others, and what to do: warn units Eps is small. Give"
    assert page["Can these numbers be trusted?"].startswith(expected)


def test_classes_and_confusions_are_counted(report, page):
    text = page["Class by class"]
    for class_id, found in report.by_class.items():
        share = f"{100 * found.robust_accuracy:.1f} %"
        assert f" {class_id} {found.num_examples} {100 * found.clean_accuracy:.1f} % {share}" in text
    others = report.read_as - np.diag(np.diag(report.read_as))
    true, other = np.argwhere(others == others.max())[0]
    total = report.by_class[int(true)].num_examples
    assert f"Most confused: {true}, read as {other} in {others.max()} of {total} examples." in text


def test_the_gallery_begins_with_the_weakest_class(report, page, path):
    text = page["Images that mislead the model"]
    weakest = min(report.by_class, key=lambda class_id: report.by_class[class_id].robust_accuracy)
    first = re.search(r"true (\d) → read as (\d) , ([\d.]+) % sure changed by 0.1 ", text)
    assert int(first[1]) == weakest
    assert page.tags.count("figure") == 12
    assert page.tags.count("img") == 36


def test_the_page_asks_for_nothing_and_runs_nothing(page):
    assert page.requests == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)


def test_comparisons_are_rows_of_one_table(report, other_report, page):
    text = page["Compared with other models"]
    ours, theirs = ([name is None for name in found.per_example["broken_by"]] for found in (report, other_report))
    assert sum(theirs) != sum(ours)
    difference = 100 * (sum(ours) - sum(theirs)) / 60
    expected = f"the model other robust {100 * sum(ours) / 60:.1f} % {100 * sum(theirs) / 60:.1f} % {difference:+.1f} "
    assert expected in text
    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((ours, theirs), (theirs, ours))]
    low, high = compare(report, other_report).robust.over_images
    assert f"{100 * low:+.1f} to {100 * high:+.1f} {only[0]} and {only[1]} the model other without an attack" in text
    assert text.count(" robust ") == 2


def test_all_sections_and_settings_are_there(report, page):
    assert list(page.sections)[1:] == [
        "Can these numbers be trusted?",
        "What each attack took away",
        "Images that mislead the model",
        "Class by class",
        "How the accuracy falls with the size of the change",
        "How small a change misleads the model",
        "Compared with other models",
        "How this was measured",
    ]
    text = page["How this was measured"]
    for word in (report.provenance["model"], report.provenance["data"], keras.__version__, "We attacked 60 examples"):
        assert word in text


def test_a_curve_of_another_suite_says_so(report, page):
    text = page["How the accuracy falls with the size of the change"]
    assert "The curve was measured with the suite quick. Its accuracies are upper bounds: at the evaluated eps" in text
    options = {"eps": [0, 0.1], "attacks": ["fgsm_ce"], "checks": [], "verbose": 0}
    same = Page(html.render(report, curve=robustness_curve(*images(), **options)))
    assert "measured with the suite" not in same["How the accuracy falls with the size of the change"]


def test_distances_are_a_sentence(report, page):
    text = page["How small a change misleads the model"]
    assert text.startswith(
        "Half of the examples are misread after a change of at most 0.188 (L2; 95 % interval of this"
    )
    none = MinimalDistances([0.1, np.inf, np.inf], np.zeros((3, 2)), range(3), {"norm": "inf"})
    text = Page(html.render(report, distances=none))["How small a change misleads the model"]
    assert text == "For more than half of the examples, no perturbation was found that misleads the model."


def test_foreign_names_are_escaped(report):
    names = [EVIL, "b", "c"]
    foreign = RobustnessReport(
        report.settings | {"suite": EVIL, EVIL: EVIL},
        [report.attacks[0] | {"name": EVIL}],
        [Check(EVIL, "fail", 0.0, EVIL)],
        report.per_example | {"broken_by": [name and EVIL for name in report.per_example["broken_by"]]},
        report.provenance | {"classes": names, "model": EVIL, "versions": {EVIL: EVIL}},
        report.kept,
    )
    text = html.render(foreign, title=EVIL, comparisons=[compare(foreign, foreign, names=(EVIL, EVIL))])
    page = Page(text)
    assert "script" not in page.tags
    assert not {"\x1b", "\u202e"} & set(text)
    assert "Not trustworthy: a check failed." in page[""]


def test_reports_of_other_kinds_have_pages(report, tmp_path):
    x, y = inputs(30)
    vectors = evaluate_robustness(linear_model(), x, y, eps=0.1, norm=2, suite="quick", verbose=0, keep_examples=True)
    vectors.to_html(tmp_path / "vectors.html")
    page = Page((tmp_path / "vectors.html").read_text(encoding="utf-8"))
    assert "an attacker makes a change of a length (L2) of at most 0.1 on a scale from 0 to 1" in page[""]
    assert "An upper bound: the suite quick has few or weak attacks." in page[""]
    assert "Images that mislead the model" not in page.sections
    without = RobustnessReport(*list(vars(vectors).values())[:5])
    without.to_html(tmp_path / "without.html")
    page = Page((tmp_path / "without.html").read_text(encoding="utf-8"))
    assert (
        "They were not kept. If the inputs are images, evaluate with keep_examples=True"
        in page["Images that mislead the model"]
    )
    model = keras.Sequential([keras.Input((5, 1)), layers.Dense(2)])
    options = {"eps": [[0.1]] * 4 + [[0.2]], "suite": "quick", "checks": [], "verbose": 0}
    x = np.random.default_rng(0).random((6, 5, 1))
    positions = evaluate_robustness(model, x, np.zeros((6, 5)), task="positions", **options, keep_examples=True)
    positions.to_html(tmp_path / "positions.html", title="tagger")
    text = (tmp_path / "positions.html").read_text(encoding="utf-8")
    assert "Of 30 test positions" in text
    assert "at most 0.1 to 0.2, by feature, on a scale" in text
    labels = evaluate_robustness(
        linear_model(), *(inputs(9)[0], np.eye(3)[inputs(9)[1]]), task="multilabel", **options | {"eps": 0.1}
    )
    labels.to_html(tmp_path / "labels.html")


def test_a_file_that_exists_is_not_lost(report, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="which exists"):
        report.to_html(tmp_path / "report.html", overwrite=False)
    with pytest.raises(ValueError, match="`path` must lie in a folder that can be written to"):
        report.to_html(tmp_path / "nowhere" / "report.html")
    with pytest.raises(ValueError, match="`comparison` must be what `compare` returns. Received: comparison=<Robust"):
        report.to_html(tmp_path / "other.html", comparison=report)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_notebook_shows_the_verdict(report, monkeypatch):
    text = report._repr_html_()
    assert "<html" not in text
    assert "<img" not in text
    assert "Of 60 test examples" in text
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert report._repr_html_() is None
    with pytest.raises(ImportError, match="HTML reports need `pip install jinja2`"):
        report.to_html("report.html")


CONTRASTS = """
const luminance = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number);
const background = element => {
  for (; element; element = element.parentElement) {
    const color = numbers(getComputedStyle(element).backgroundColor);
    if (color.length == 3 || color[3] == 1) return color;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || ["STYLE", "SCRIPT"].includes(element.tagName)) continue;
  const style = getComputedStyle(element), isDrawn = element instanceof SVGElement;
  const ink = luminance(numbers(isDrawn ? style.fill : style.color)), paper = luminance(background(element));
  found.push([(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), element.textContent.slice(0, 40)]);
}
return found;
"""


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or binary is None:
        pytest.skip("could not import a browser: `apt-get install chromium chromium-driver`")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{argument}")
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_a_browser_shows_the_page(browser, path, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    widths = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert widths == [2] * 36
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 100
    assert [text for contrast, text in contrasts if contrast < 4.5] == []
    paper = browser.execute_script("return getComputedStyle(document.querySelector('.drsl')).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")

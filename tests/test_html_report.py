"""The offline report: what it computes against closed forms, what it lets into the page, and the page in a browser.

The tests in a browser need Chromium, its driver and selenium; they are skipped where one of them is missing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import bench.html_report as html_report
from bench.floor import TEST, Floor
from bench.html_report import embedded_json, write_html_report
from bench.ranking import BEYOND, TUNED, UNTRAINED
from bench.report_page.data import report_data
from bench.table import layout

EVIL = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"
BUDGETS = (4, 10, 20)
FLOORS = (Floor(TEST, 500, 0.1, 0.08, 0.12, 0.01),)
BASE = {"role": "sampler", "model": "toy", "model_hash": "abc", "metric": "fd_toy", "num_samples": 500, "dtype": "fp32"}
VALUES = {"euler": (9.0, 3.0, 0.8), "heun": (700.0, 2.9, 0.3), "dpm": (2.0, 1.5, 0.9), "student": (1.0, 0.9, 4.0)}


def row(label, budget, value, seed=0, half=0.2, **fields):
    return {
        **BASE,
        "label": label,
        "sampler": label,
        "options": {},
        "hashes": {"extractor": "e1", "reference": "r1"},
        "plan_hash": f"{label}{budget}",
        "budget": budget,
        "nfe": budget,
        "seed": seed,
        "status": "done",
        "value": value,
        "low": value - half,
        "high": value + half,
        "standard_error": half / 1.96,
        "metrics": {"kid": {"value": value / 100 - 0.004, "low": None, "high": None, "standard_error": None}},
        "label_agreement": 0.9,
        "images_per_second": 1000.0 / budget,
        "seconds": 1.5,
        **fields,
    }


def failed(label, budget, reason, status="failed"):
    return {**BASE, "label": label, "budget": budget, "seed": 0, "status": status, "reason": reason, "options": {}}


@pytest.fixture(scope="module")
def rows():
    found = []
    for label, values in VALUES.items():
        student = label == "student"
        for budget, value in zip(BUDGETS, values, strict=True):
            extra = {"trained": budget < 20} if student else {}
            found += [row(label, budget, value + 0.02 * seed, seed, **extra) for seed in ((0,) if student else (0, 1))]
    found += [row(EVIL, 4, 5.0), failed("broken", 10, "SamplingError: <b>NaN</b> at step 3")]
    return [*found, row("euler", 100, 0.5, role="teacher", plan_hash="euler20")]


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    for k, name in enumerate(
        ("euler-nfe4", "euler-nfe20", "heun-nfe4", "heun-nfe20", "heun-nfe20-path", "euler-nfe100")
    ):
        save_picture(out / "samples" / f"{name}.png", 40 * k)
    write_html_report(rows, FLOORS, f"toy {EVIL}", {"commit": EVIL, "nfe": list(BUDGETS)}, out, f"a note {EVIL}")
    return out


def pixels_of(uri):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        return np.asarray(picture.convert("RGB"))


def save_picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 20), shade, dtype=np.uint8)).save(path)


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and the text of each script and style."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.raw, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.raw if self.cdata_elem else self.words).append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(page):
    return strict_json(next(text for text in Parsed(page).raw if text.startswith("{")))


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# what is computed


def test_a_page_and_a_table_say_the_same_of_every_row(rows):
    """Value with half its interval, best, tie and what is beyond the model, of distances and of a quality."""
    recall = {"low": 0.0, "high": 1.0, "standard_error": 0.01}
    rows = [
        {**one, "metrics": {"recall": {"value": 1 / (1 + one["value"]), **recall}}} if "value" in one else one
        for one in rows
    ]
    cut = [row("cut", budget, 0.3, low=0.0, high=1.2, label_agreement=None) for budget in BUDGETS]
    rows += [row("tie", 4, 1.3, half=0.3), row("above", 10, 0.1, metrics={"recall": {"value": 0.9, **recall}}), *cut]
    points = {(p["role"], p["label"], p["budget"]): p for p in report_data(rows, (), "t", {})["points"]}
    seen = set()
    for name in ("fd_toy", "recall"):
        shown = layout(rows, name)
        for label in shown.labels:
            for budget, text in zip(shown.budgets, shown.texts(label, "**{}".format, "= {}".format), strict=True):
                point = points.get(("sampler", label, budget), {"metrics": {}})
                if name not in point["metrics"]:
                    assert text in ("", "failed")
                    continue
                entry = point["metrics"][name]
                signs = (UNTRAINED if point["untrained"] else "") + (BEYOND if entry["beyond"] else "")
                assert {"best": "**", "tied": "= ", "": ""}[entry["mark"]] + entry["text"] + signs == text
                seen.add((name, entry["mark"], entry["beyond"]))
    assert {("fd_toy", "best", True), ("fd_toy", "tied", False), ("recall", "best", True)} <= seen
    assert (
        points["sampler", "cut", 4]["metrics"]["fd_toy"]["text"] == "0.30 \N{PLUS-MINUS SIGN} 0.90"
    )  # the longer side


def test_rows_of_two_models_are_two_points_each_beside_its_own_model(tmp_path):
    """They were averaged, and the first model's own value stood for both."""
    rows = [
        row("heun", 4, value, model=model, model_hash=model, role=role)
        for model, role, value in (
            *(("m1", "sampler", 1.0), ("m1", "teacher", 0.9)),
            *(("m2", "sampler", 5.0), ("m2", "teacher", 6.0)),
        )
    ]
    save_picture(tmp_path / "samples" / "heun-nfe4.png", 7)
    save_picture(tmp_path / "samples" / "teacher-nfe4.png", 9)
    data = data_of(write_html_report(rows, (), "t", {}, tmp_path).read_text("utf-8"))
    mine = {p["label"]: p["metrics"]["fd_toy"] for p in data["points"] if p["role"] == "sampler"}
    assert {label: (entry["value"], entry["beyond"]) for label, entry in mine.items()} == {
        "heun (m1)": (1.0, False),
        "heun (m2)": (5.0, True),
    }
    assert [sampler["label"] for sampler in data["samplers"]] == list(mine)
    assert [(own["name"], own["value"]) for own in data["metrics"][0]["models"]] == [
        ("model m1 (heun, 4 calls)", 0.9),
        ("model m2 (heun, 4 calls)", 6.0),
    ]
    assert [p["picture"] for p in data["points"]] == [None] * 4  # which of them a file shows its name does not tell


def test_label_agreement_has_wilsons_interval():
    data = report_data([row("a", 4, 1.0, label_agreement=0.98)], (), "t", {})
    entry = data["points"][0]["metrics"]["label_agreement"]
    exact = stats.binomtest(490, 500).proportion_ci(method="wilson")
    assert (entry["low"], entry["high"]) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_points_are_seeds_together_with_what_failed_beside_them(rows):
    data = report_data(rows, FLOORS, "t", {})
    points = {(p["role"], p["label"], p["budget"]): p for p in data["points"]}
    assert len(points) == len(data["points"]) == 4 * 3 + 3
    euler = points["sampler", "euler", 4]
    assert (euler["seeds"], euler["ms"], len(euler["rows"])) == (2, pytest.approx(4.0), 2)
    assert euler["metrics"]["fd_toy"]["value"] == pytest.approx(9.01)
    broken = points["sampler", "broken", 10]
    assert (broken["status"], broken["metrics"], broken["ms"]) == ("failed", {}, None)
    assert [data["rows"][k]["seed"] for k in euler["rows"]] == [0, 1]
    assert [metric["name"] for metric in data["metrics"]] == ["fd_toy", "kid", "label_agreement"]


def test_a_seed_that_failed_leaves_a_point_of_the_others_with_its_reason():
    data = report_data([row("a", 4, 1.0), {**failed("a", 4, "out of memory"), "seed": 1}], (), "t", {})
    (point,) = data["points"]
    assert (point["status"], point["seeds"], point["reason"]) == ("done", 1, "out of memory")


def test_what_is_better_than_the_model_itself_is_marked(rows):
    data = report_data(rows, FLOORS, "t", {})
    for name in ("fd_toy", "kid"):
        beyond = {(p["label"], p["budget"]) for p in data["points"] if p["metrics"].get(name, {}).get("beyond")}
        assert beyond == {("heun", 20)}


def test_a_distance_that_is_not_finite_is_a_failure_and_no_nan_of_json():
    bad = row("a", 4, float("nan"), seconds=np.float64("inf"), nfe=np.int64(4), options={"x": np.float32(0.5)})
    data = report_data([bad], (), "t", {"spread": float("nan")})
    assert data["points"][0]["status"] == "failed"
    assert "finite" in data["points"][0]["reason"]
    read = strict_json(embedded_json(data))
    assert read["rows"][0]["value"] is None
    assert read["rows"][0]["nfe"] == 4
    assert read["rows"][0]["options"] == {"x": 0.5}


@pytest.mark.parametrize("rows", [[], [row("a", 4, 1.0), row("b", 4, 1.0, metric="fid")]], ids=["none", "two metrics"])
def test_rows_of_no_or_two_metrics_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=rf"^rows must be .* got {len(rows)} of"):
        write_html_report(rows, (), "t", {}, tmp_path)


# what is in the page


def test_the_report_is_one_file(rows, tmp_path):
    path = write_html_report(rows, FLOORS, "t", {}, tmp_path)
    assert path == tmp_path / "report.html"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_in_the_page_names_another_place(page):
    assert "http://" not in page
    assert "https://" not in page
    addresses = [
        attributes[name] for _, attributes in Parsed(page).elements for name in ("src", "href") if name in attributes
    ]
    assert addresses == ["data:,"]
    assert "url(" not in page
    assert "@import" not in page


def test_only_the_one_script_and_style_of_the_page_may_run(page):
    parsed = Parsed(page)
    (policy,) = [meta["content"] for meta in parsed.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    style, data, script = (text for text in parsed.raw if text.strip())
    for source in (style, script):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert strict_json(data)["title"] == f"toy {EVIL}"


def test_texts_of_users_stay_texts(page):
    parsed = Parsed(page)
    assert [script.get("type") for script in parsed.of("script")] == ["application/json", "module"]
    assert not parsed.of("img")
    assert not parsed.of("b")[1:]
    assert "".join(parsed.words).count(EVIL) >= 5  # title, heading, note, tables
    assert not any("onerror" in attributes for _, attributes in parsed.elements)


def test_the_data_block_has_no_character_that_could_end_it():
    text = embedded_json({"a": "</script><!--<script>&\u2028\ud800"})
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert strict_json(text) == {"a": "</script><!--<script>&\u2028\ud800"}


def test_a_label_without_utf8_still_gives_a_page(tmp_path):
    path = write_html_report([row("bad \ud800", 4, 1.0)], (), "t", {}, tmp_path)
    assert "bad ?" in path.read_text(encoding="utf-8")


def test_scripts_never_parse_text_as_markup():
    for script in html_report._SCRIPTS:
        source = (files("bench") / "report_page" / script).read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "import("):
            assert word not in source, (script, word)


def test_every_script_of_the_folder_is_in_the_page():
    found = {path.name for path in (files("bench") / "report_page").iterdir() if path.name.endswith(".js")}
    assert found == set(html_report._SCRIPTS)


def test_without_scripts_every_row_and_the_best_sets_can_be_read(page, rows):
    start = page.rindex("<noscript>")
    plain = Parsed(page[start : page.index("</noscript>", start)])
    assert len(plain.of("tr")) == len(rows) + 1
    assert "SamplingError: <b>NaN</b> at step 3" in plain.words
    matrix = page[page.index('data-metric="fd_toy"') : page.index('data-metric="kid"')]
    marks = [cell.get("class", "") for cell in Parsed(matrix).of("td")]
    assert sum("best" in mark for mark in marks) == 3  # one for each budget
    assert [mark for mark in marks if "beyond" in mark] == ["best beyond"]
    assert "failed none" in marks


def test_tied_samplers_are_marked_in_the_table(tmp_path):
    rows = [row("a", 4, 1.0), row("b", 4, 1.35), row("c", 4, 1.5)]
    page = write_html_report(rows, (), "t", {}, tmp_path).read_text(encoding="utf-8")
    matrix = page[page.index('data-metric="fd_toy"') : page.index('data-metric="kid"')]
    assert [cell["class"] for cell in Parsed(matrix).of("td")] == ["best", "tied", ""]
    assert matrix.count("= <span>1.35</span>") == matrix.count("= <span>") == 1


def test_a_page_where_nothing_was_measured_says_why(tmp_path):
    rows = [failed("a", 4, "NaN <at> step 3"), failed("a", 10, "out of memory"), failed("b", 4, "too few", "absent")]
    page = write_html_report(rows, FLOORS, "t", {}, tmp_path).read_text("utf-8")
    assert '<p class="notice">Nothing was measured: 2 failed, 1 absent. Each row below says why.</p>' in page
    assert {"NaN <at> step 3", "out of memory", "too few"} <= set(Parsed(page).words)
    assert [point["status"] for point in data_of(page)["points"]] == ["failed", "failed", "absent"]


def test_pictures_are_embedded_and_the_model_takes_those_of_its_plan(page, folder):
    data = data_of(page)
    pictures = {(p["role"], p["label"], p["budget"]): p for p in data["points"]}
    heun = pictures["sampler", "heun", 20]
    for name, shade in (("picture", 120), ("path", 160)):
        assert np.unique(pixels_of(heun[name])).tolist() == [shade]
    assert pictures["sampler", "dpm", 4]["picture"] is None
    assert heun["picture"] != heun["path"]
    assert np.unique(pixels_of(pictures["teacher", "euler", 100]["picture"])).tolist() == [200]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("enlarged", [True, False])
def test_pictures_are_embedded_exactly_and_without_the_enlargement(tmp_path, channels, enlarged):
    """Every pixel of the file once; of the ways of eight samples, those of the first two."""
    shade = np.random.default_rng(0).integers(0, 256, (48, 60, channels), dtype=np.uint8)
    shown = shade.repeat(2, 0).repeat(2, 1) if enlarged else shade
    (tmp_path / "samples").mkdir()
    for ending in ("", "-path"):
        Image.fromarray(shown.squeeze()).save(tmp_path / "samples" / f"a-nfe4{ending}.png")
    page = write_html_report([{**row("a", 4, 1.0), "num_samples": 100}], (), "t", {}, tmp_path).read_text("utf-8")
    point = data_of(page)["points"][0]
    np.testing.assert_array_equal(pixels_of(point["picture"]), np.broadcast_to(shade, (48, 60, 3)))
    np.testing.assert_array_equal(pixels_of(point["path"]), np.broadcast_to(shade[:12], (12, 60, 3)))


def test_only_pictures_of_the_folder_are_read(tmp_path):
    save_picture(tmp_path / "secret-nfe4.png", 1)
    (tmp_path / "run" / "samples").mkdir(parents=True)
    page = write_html_report([row("../../secret", 4, 1.0)], (), "t", {}, tmp_path / "run")
    assert data_of(page.read_text(encoding="utf-8"))["points"][0]["picture"] is None


def test_pictures_beyond_the_limit_are_counted(tmp_path, monkeypatch):
    for budget in BUDGETS:
        save_picture(tmp_path / "samples" / f"a-nfe{budget}.png", 7)
    size = len(html_report._encoded(tmp_path / "samples" / "a-nfe4.png"))
    monkeypatch.setattr(html_report, "_PICTURE_LIMIT", 2 * size)
    page = write_html_report([row("a", budget, 1.0) for budget in BUDGETS], (), "t", {}, tmp_path).read_text("utf-8")
    data = data_of(page)
    assert [p["picture"] is not None for p in data["points"]] == [True, True, False]
    assert data["left_out"] == 1


# the page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    quiet = ["background-networking", "component-update", "sync", "quic", "gpu"]
    for argument in ("headless=new", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield found
    found.quit()


class Page:
    """The report in a browser; `run` gives what a function body of JavaScript returns."""

    def __init__(self, browser):
        self.browser = browser

    def run(self, body, *arguments):
        return self.browser.execute_script(body, *arguments)

    def each(self, selector, expression):
        """The value of a JavaScript expression in `e` for every element."""
        return self.run(f"return [...document.querySelectorAll(arguments[0])].map((e) => {expression})", selector)

    def texts(self, selector):
        return self.each(selector, "e.textContent")

    def count(self, selector):
        return len(self.texts(selector))

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)

    def enter(self, selector, value):
        self.run(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "for (const name of ['input', 'change']) e.dispatchEvent(new Event(name, {bubbles: true}))",
            selector,
            value,
        )

    def names(self):
        """Sampler and budget of the table's lines."""
        lines = self.each("tr.point", "[e.querySelector('.opener').textContent, e.cells[1].textContent]")
        return [(label, int(budget)) for label, budget in lines]

    def open(self, label, budget):
        """Press the button of a line of the table."""
        self.run(f"document.querySelectorAll('.opener')[{self.names().index((label, budget))}].click()")

    def resize(self, width, height, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


@pytest.fixture
def shown(browser, folder):
    page = Page(browser)
    page.resize(1440, 900)
    browser.get((folder / "report.html").as_uri())
    yield page
    assert [entry["message"] for entry in browser.get_log("browser")] == []  # no error, no refused source
    assert page.run("return window.owned") is None


@pytest.mark.slow
def test_a_request_never_leaves_the_page(shown, browser, folder):
    browser.get_log("performance")  # what the browser did before
    browser.refresh()
    for budget in range(2):
        shown.enter("#budget", budget)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert (folder / "report.html").as_uri() in sent
    assert [url for url in sent if not url.startswith("data:") and url != (folder / "report.html").as_uri()] == []


def test_charts_draw_each_sampler_with_its_points_and_intervals(shown):
    assert shown.texts("#legend .entry") == [*VALUES, EVIL]  # what failed has no line
    for chart in ("#chart-nfe", "#chart-ms"):
        assert shown.count(f"{chart} .series > .line") == 5
        assert shown.count(f"{chart} .point") == shown.count(f"{chart} .error") == 13
        assert shown.texts(f"{chart} .reference text") == ["the model itself, 0.50 ± 0.20", "floor, 0.1"]
        assert shown.count(f"{chart} .series.student") == 1
        assert shown.count(f"{chart} .untrained") == 1
    looks = "[getComputedStyle(e.querySelector('.line')).stroke, e.querySelector('.marker').getAttribute('d')]"
    strokes, markers = zip(*shown.each("#legend .entry", looks), strict=True)
    assert len(set(strokes)) == len(set(markers)) == 5
    dashes = dict(
        zip(VALUES, shown.each("#chart-nfe .series > .line", "getComputedStyle(e).strokeDasharray"), strict=False)
    )
    assert [label for label, dash in dashes.items() if dash != "none"] == ["student"]


def test_points_stand_where_logarithm_and_line_put_them(shown):
    def places():
        transforms = shown.each("#chart-nfe [data-label=euler] .point", "e.getAttribute('transform')")
        return np.array([[float(part) for part in text[len("translate(") : -1].split()] for text in transforms])

    def share(values):
        return (values[1] - values[0]) / (values[2] - values[0])

    x, y, values = np.array(BUDGETS), places(), np.array(VALUES["euler"]) + 0.01
    assert share(y[:, 0]) == pytest.approx(share(np.log(x)), abs=1e-3)
    assert share(y[:, 1]) == pytest.approx(share(np.log(values)), abs=1e-3)
    shown.click("#chart-nfe [data-axis=x]")
    assert share(places()[:, 0]) == pytest.approx(share(x), abs=1e-3)
    shown.click("#legend .entry[data-label=heun]")  # whose 700 would leave no pixels to the others
    shown.click("#chart-nfe [data-axis=y]")
    assert share(places()[:, 1]) == pytest.approx(share(values), abs=2e-3)
    assert places()[0, 1] < places()[1, 1] < places()[2, 1]  # upwards is larger


def test_an_interval_that_ends_near_zero_does_not_stretch_the_axis(shown, browser, tmp_path):
    """One end of 3.5e-6 pressed every point into the upper half."""
    rows = [row("a", n, value) for n, value in zip(BUDGETS, (9.0, 3.0, 0.6), strict=True)] + [
        row("b", 20, 0.3, low=3.5e-6)
    ]
    browser.get(write_html_report(rows, (), "t", {}, tmp_path).as_uri())
    ticks = shown.texts("#chart-nfe .axis.y text:not(.title)")
    assert 0.1 <= min(map(float, ticks)) <= 0.3
    # the bar is cut at the frame, and what ends beyond it has no cap
    assert shown.each("#chart-nfe .error", "e.getAttribute('d').split('H').length - 1") == [2, 2, 2, 1]
    ends = "e.getBoundingClientRect().bottom"
    bar, frame = (shown.each(f"#chart-nfe {part}", ends)[-1] for part in (".error", ".axis.x .base"))
    assert bar <= frame


def test_a_page_of_failures_shows_them_and_no_empty_chart(shown, browser, tmp_path):
    rows = [failed("a", 4, "NaN at step 3"), failed("a", 10, "out of memory")]
    browser.get(write_html_report(rows, (), "t", {}, tmp_path).as_uri())
    assert not shown.run("return document.querySelector('#curves').checkVisibility()")
    assert shown.texts("tr.point.failed .reason") == ["NaN at step 3", "out of memory"]
    assert shown.texts(".matrix td") == ["failed", "failed"]


def test_every_model_has_its_line_and_what_is_beyond_its_own_is_told(shown, browser, tmp_path):
    rows = [
        row("heun", 4, value, model=model, model_hash=model, role=role, metrics={})
        for model, role, value in (
            *(("m1", "sampler", 1.0), ("m1", "teacher", 0.9)),
            *(("m2", "sampler", 5.0), ("m2", "teacher", 6.0)),
        )
    ]
    browser.get(write_html_report(rows, (), "t", {}, tmp_path).as_uri())
    lines = [
        f"model {name} (heun, 4 calls), {value} \N{PLUS-MINUS SIGN} 0.20"
        for name, value in (("m1", "0.90"), ("m2", "6.00"))
    ]
    assert shown.texts("#chart-nfe .reference text") == lines
    assert shown.count("#chart-nfe .reference rect") == 0
    assert shown.texts("#warning") == [
        "One row lies below the model's own value: here the model, not the sampler, is ranked (heun (m2) at 4)."
    ]


def test_hover_shows_the_sampler_its_calls_and_its_value(shown, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    point = browser.find_element(By.CSS_SELECTOR, "#chart-nfe .series[data-label=heun] .point:last-of-type")
    assert not browser.find_element(By.CSS_SELECTOR, "#chart-nfe .tip").is_displayed()
    ActionChains(browser).move_to_element(point).perform()
    tip = browser.find_element(By.CSS_SELECTOR, "#chart-nfe .tip")
    assert tip.is_displayed()
    lines = tip.text.splitlines()
    assert lines[:3] == ["heun", "NFE 20", "fd_toy 0.31 ± 0.14"]  # 0.2 / sqrt(2) of two seeds
    assert "2 seeds" in lines[3]
    assert "best of its budget" in lines
    assert any("here the model" in line for line in lines)
    away = abs(tip.rect["x"] + tip.rect["width"] / 2 - point.rect["x"]), abs(tip.rect["y"] - point.rect["y"])
    assert away[0] < 200
    assert away[1] < 200


def test_arrow_keys_walk_through_the_marks(shown, browser):
    from selenium.webdriver import ActionChains, Keys

    shown.run("document.querySelector('#chart-ms .point[tabindex=\"0\"]').focus()")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert shown.run("return document.activeElement.getAttribute('aria-label')").startswith(
        "euler, NFE 10, fd_toy 3.01"
    )
    ActionChains(browser).send_keys(Keys.ARROW_DOWN).perform()
    assert shown.run("return document.activeElement.getAttribute('aria-label')").startswith("heun, NFE 10")
    assert shown.texts("#chart-ms .tip strong") == ["heun"]
    assert shown.count("#chart-ms .point[tabindex='0']") == 1


def test_the_legend_hides_and_shows_a_sampler(shown):
    shown.click("#legend .entry[data-label=heun]")
    for chart in ("#chart-nfe", "#chart-ms"):
        assert shown.count(f"{chart} .series") == 4
        assert shown.count(f"{chart} [data-label=heun]") == 0
    assert (
        shown.run("return document.querySelector('#legend [data-label=heun]').getAttribute('aria-pressed')") == "false"
    )
    shown.click("#legend .entry[data-label=heun]")
    assert shown.count("#chart-nfe .series") == 5
    for label in VALUES:
        shown.click(f"#legend .entry[data-label={label}]")
    shown.click("#legend .entry:last-child")
    assert shown.count("#chart-nfe .empty") == 1


def test_another_metric_takes_the_axis_and_the_table_at_a_glance(shown):
    assert shown.run("return document.querySelector('.matrix:not([hidden])').dataset.metric") == "fd_toy"
    shown.enter("#metric", 1)
    assert shown.texts("#chart-nfe .axis.y .title") == ["kid (smaller is better)"]
    assert shown.run("return document.querySelector('.matrix:not([hidden])').dataset.metric") == "kid"
    assert (
        shown.run("return document.querySelector('#chart-nfe [data-axis=y]').ariaPressed") == "false"
    )  # one is negative
    shown.click("#chart-nfe [data-axis=y]")
    assert shown.texts("#chart-nfe .omitted") == ["1 value of zero or less has no place on a logarithmic axis."]


def test_headings_sort_the_table_with_what_failed_last(shown):
    header = "#table thead th:nth-child(3)"
    shown.click(f"{header} button")
    up = shown.names()
    assert up[:2] == [("heun", 20), ("euler", 100)]
    assert up[-1] == ("broken", 10)
    assert up[-2] == ("heun", 4)
    assert shown.run("return document.querySelector(arguments[0]).ariaSort", header) == "ascending"
    shown.click(f"{header} button")
    down = shown.names()
    assert down[0] == ("heun", 4)
    assert down[-1] == ("broken", 10)
    shown.click("#table thead th:first-child button")
    labels = [label for label, _ in shown.names()]
    assert labels[0] == EVIL
    assert labels[1] == "broken"
    assert labels[-1] == "student"


def test_filters_of_text_sampler_budget_and_best_sets(shown):
    assert len(shown.names()) == 15
    assert shown.texts("#count") == ["15 of 15"]
    shown.enter("#query", "samplingerror nan")
    assert shown.names() == [("broken", 10)]
    assert shown.texts("#count") == ["1 of 15"]
    shown.enter("#query", "")
    shown.enter("#by-label", "dpm")
    assert shown.names() == [("dpm", budget) for budget in BUDGETS]
    shown.enter("#by-budget", "10")
    assert shown.names() == [("dpm", 10)]
    shown.enter("#by-label", "")
    shown.enter("#by-budget", "")
    shown.click("#only-best")
    assert shown.names() == [("heun", 20), ("student", 4), ("student", 10)]


def test_provenance_opens_for_a_row_and_for_each_seed(shown):
    shown.open("student", 4)
    fields = dict(zip(shown.texts(".details .fields dt"), shown.texts(".details .fields dd"), strict=True))
    assert (fields["hashes.extractor"], fields["plan_hash"], fields["options"]) == ("e1", "student4", "none")
    shown.open("student", 4)
    assert shown.count(".details .fields") == 0
    shown.open("euler", 4)
    assert shown.count(".details .seeds tbody tr") == 2
    assert shown.texts(".details summary") == ["everything of seed 0", "everything of seed 1"]
    assert shown.texts("tr.point.failed .reason") == ["SamplingError: <b>NaN</b> at step 3"]
    assert shown.texts("#provenance dd") == [EVIL, "4, 10, 20"]


def test_the_warning_names_the_rows_below_the_model(shown):
    (text,) = shown.texts("#warning")
    assert "here the model, not the sampler, is ranked (heun at 20)" in text


def test_slider_and_check_boxes_choose_the_pictures(shown):
    def pictured():
        expression = "[e.dataset.label, e.dataset.role, e.querySelector('img').src]"
        return shown.each("#pictures figure", expression)

    shown.enter("#budget", 0)
    first = pictured()
    assert [entry[:2] for entry in first] == [["euler", "sampler"], ["heun", "sampler"], ["euler", "teacher"]]
    shown.enter("#budget", 1)
    second = pictured()
    assert shown.texts("#budget-value") == ["20"]
    assert shown.count(".strip img") == 1
    assert [a[2] == b[2] for a, b in zip(first, second, strict=True)] == [False, False, True]
    # of one shade, they are as good as enlarged, and the page has half of their 20 columns
    assert shown.each(".tiles", "e.complete && e.naturalWidth") == [10, 10, 10]
    shown.click("#shown input")
    assert [entry[:2] for entry in pictured()] == [["heun", "sampler"], ["euler", "teacher"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_until_the_button_is_pressed(shown, scheme):
    def brightness():
        colour = shown.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(",")) / 3

    shown.resize(1440, 900, scheme)
    assert (brightness() > 128) == (scheme == "light")
    shown.click("#theme")
    assert (brightness() > 128) == (scheme != "light")
    assert shown.texts("#theme span") == ["Dark" if scheme == "dark" else "Light"]


def test_a_telephone_never_scrolls_the_page_sideways(shown, browser):
    shown.resize(390, 844)
    browser.refresh()
    shown.run("for (const opener of document.querySelectorAll('.opener')) opener.click()")
    shown.run("for (const part of document.querySelectorAll('details')) part.open = true")
    assert shown.run("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    assert shown.run("return document.querySelector('#rows .scroll').scrollWidth") > 390  # the table does, in its box
    assert shown.run("return document.querySelector('#chart-nfe svg').getBoundingClientRect().width") <= 390


def test_one_sign_has_one_meaning_in_the_page_and_in_the_tables(tmp_path):
    """A double dagger meant tuned here and below the model there."""
    tuned = row("a", 4, 1.0, tuned="on it", tuned_metrics=["kid"])
    both = [tuned, row("b", 4, 0.2), row("many", 100, 0.5, role="teacher")]
    page = write_html_report(both, (), "t", {}, tmp_path).read_text("utf-8")
    primary, kid = (page.split(f'data-metric="{name}"')[1].split("</table>")[0] for name in ("fd_toy", "kid"))
    signs = [[line.split("<sup>")[1].split("</sup>")[0] for line in part.split("<td")[1:]] for part in (primary, kid)]
    assert signs == [["", BEYOND], [TUNED, BEYOND]]
    key = page.split('<p class="key"><b>Bold</b>')[1].split("</p>")[0]
    assert "&Dagger; lies below" in key
    assert "&sect; was tuned" in key

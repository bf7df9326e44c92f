"""The page of tools/compare.py --html in a real browser, and the picture of --png."""

import json
import shutil
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from engine.config import yaml12
from engine.config.command_line import run_tool
from tests.running import metrics, results
from tools.compare import main

INSTALL = "the page is opened in Chromium: apt-get install chromium chromium-driver, pip install -r requirements-dev.txt"
MOST_BYTES = 5_000_000
HOSTILE = "<script>document.title = 'hostile'</script>"


def compare(*argv, code=0):
    assert run_tool(lambda: main([str(word) for word in argv])) == code


@pytest.fixture(scope="module")
def runs(small_runs, tmp_path_factory):
    """LeNet, ResNet-18, GoogLeNet and ViT, a second seed of the ViT, and a failed run without a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for name in small_runs:
        shutil.copytree(small_runs[name], folder / name, symlinks=True)
    shutil.copytree(small_runs["vit"], folder / "vit-seed-7", symlinks=True)
    change_config(folder / "vit-seed-7", seed=7)
    again = results(folder / "vit-seed-7")
    again["best"]["valid/acc@1"] /= 2
    (folder / "vit-seed-7" / "results.json").write_text(json.dumps(again))
    failed = results(small_runs["lenet"]) | {"status": "failed", "why": HOSTILE, "macs": None}
    shutil.copytree(small_runs["lenet"], folder / "failed", ignore=shutil.ignore_patterns("ckpt"))
    (folder / "failed" / "results.json").write_text(json.dumps(failed))
    return folder


def change_config(run, **values):
    config = yaml12.parse((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml12.dump(config | values))


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    compare(runs, "--html", path, "--mistakes", 3)
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason=INSTALL)
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip(INSTALL)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={profile}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(chromium, page):
    """A freshly opened page in a browser with empty logs."""
    open_page(chromium, page)
    return chromium


def open_page(browser, page, width=1280, scheme="light"):
    mobile = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", mobile)
    choose_scheme(browser, scheme)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    wait_for(browser, "return document.body.dataset.ready === 'true'")


def choose_scheme(browser, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def wait_for(browser, script):
    for _ in range(300):
        if browser.execute_script(script):
            return
        time.sleep(0.1)
    pytest.fail(f"never true: {script}; {browser.get_log('browser')}")


def cells(browser, column):
    """Return {name: number of a column, or None} of the visible rows, from the top."""
    return dict(
        browser.execute_script(
            """return [...document.querySelectorAll("#runs tbody tr")].filter(row => !row.hidden).map(row => {
                const cell = row.querySelector(`[data-name="${arguments[0]}"]`)
                return [row.firstElementChild.textContent, "value" in cell.dataset ? Number(cell.dataset.value) : null]
            })""",
            column,
        )
    )


def find(browser, selector):
    return browser.find_element("css selector", selector)


def head(browser, title):
    return browser.find_element("xpath", f"//table[@id='runs']//button[text()='{title}']")


def choose(browser, select, value):
    find(browser, f"#{select} option[value='{value}']").click()


def drawn_curve(browser, name):
    return browser.execute_script(
        """const source = Bokeh.documents.map(chart => chart.get_model_by_name(arguments[0])).find(found => found !== null)
        return [[...source.data.x], [...source.data.y]]""",
        name,
    )


def test_page_opens_without_errors_and_network_requests(opened):
    logged = [entry for entry in opened.get_log("browser") if entry["level"] != "INFO"]
    assert logged == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert len([url for url in asked if url.startswith("file:")]) == 1
    assert opened.title == "5 trainings compared"  # HOSTILE was not executed


def test_page_has_the_numbers_of_results_json(opened, runs):
    for key in ("params", "macs", "images_per_sec", "wall_time", "peak_memory_mb"):
        shown = cells(opened, key)
        assert set(shown) == {"lenet", "resnet18", "googlenet", "vit", "failed"}
        assert {name: shown[name] for name in ("lenet", "resnet18", "failed")} == {
            name: results(runs / name)[key] for name in ("lenet", "resnet18", "failed")
        }
    for column in ("best", "last"):
        shown = cells(opened, column)
        for name in ("lenet", "resnet18", "googlenet"):
            assert shown[name] == results(runs / name)[column]["valid/acc@1"]
    seeds = [results(runs / name)["best"]["valid/acc@1"] for name in ("vit", "vit-seed-7")]
    assert cells(opened, "best")["vit"] == pytest.approx(sum(seeds) / 2, rel=1e-12)
    assert HOSTILE in find(opened, "#table").text


def test_click_on_a_title_sorts_and_a_second_click_reverses(opened):
    for column, title in (("best", "best acc@1"), ("params", "parameters"), ("macs", "MACs")):
        head(opened, title).click()
        values = [value for value in cells(opened, column).values() if value is not None]
        assert values == sorted(values, reverse=True)
        head(opened, title).click()
        values = list(cells(opened, column).values())
        assert values[: 4 if column == "macs" else 5] == sorted(value for value in values if value is not None)
    assert list(cells(opened, "macs"))[-1] == "failed"  # it has no MACs
    head(opened, "run").click()
    assert list(cells(opened, "best")) == ["failed", "googlenet", "lenet", "resnet18", "vit"]


def test_filter_applies_to_table_charts_and_mistakes(opened):
    box = find(opened, "#filter")
    box.send_keys("shapes net")
    assert list(cells(opened, "best")) == ["googlenet", "resnet18"]
    assert find(opened, "#shown").text == "2 of 5"
    visible = opened.execute_script(
        """return Bokeh.documents.map(chart => [...new Set([...chart.all_models]
            .filter(model => model.type === "GlyphRenderer" && model.visible).map(model => model.tags[0]))].sort())"""
    )
    order = ["failed", "googlenet", "lenet", "resnet18", "vit"]  # of the run folders
    assert visible == [[order.index("googlenet"), order.index("resnet18")]] * 3
    shown = [part.text.split()[0] for part in opened.find_elements("css selector", ".mistakes") if part.is_displayed()]
    assert shown == ["googlenet", "resnet18"]
    box.clear()
    box.send_keys("no such thing")
    assert cells(opened, "best") == {}


def test_curves_have_the_logged_values_over_the_selected_axis(opened, runs):
    lines = [line for line in metrics(runs / "lenet") if "valid/acc@1" in line]
    x, y = drawn_curve(opened, "curve-2-0")
    assert x == [line["step"] for line in lines]
    assert y == pytest.approx([100 * line["valid/acc@1"] for line in lines], rel=1e-5)
    choose(opened, "y", "train/loss")
    choose(opened, "x", "epoch")
    lines = [line for line in metrics(runs / "lenet") if "train/loss" in line]
    x, y = drawn_curve(opened, "curve-2-0")
    assert x == pytest.approx([line["epoch"] for line in lines], rel=1e-5)
    assert y == pytest.approx([line["train/loss"] for line in lines], rel=1e-5)
    choose(opened, "y", "train/loss_aux1")
    assert drawn_curve(opened, "curve-2-0") == [[], []]  # LeNet has no auxiliary head
    assert len(drawn_curve(opened, "curve-1-0")[0]) == len(metrics(runs / "googlenet"))
    labels = opened.execute_script(
        "return ['curves-x', 'curves-y'].map(name => Bokeh.documents[0].get_model_by_name(name).axis_label)"
    )
    assert labels == ["epoch", "train/loss_aux1"]


def test_mistakes_are_wrong_predictions_with_images(opened):
    found = opened.execute_script(
        """return [...document.querySelectorAll(".mistakes")].map(part => [part.querySelector("h3").textContent.split(" ")[0],
            [...part.querySelectorAll("figure")].map(figure => [figure.querySelector("img").naturalWidth,
            ...figure.querySelector("figcaption").innerText.split("\\n")])])"""
    )
    of_run = dict(found)
    assert of_run["failed"] == []
    assert "none shown: " in opened.find_elements("css selector", ".mistakes")[0].text
    for name in ("lenet", "resnet18", "googlenet", "vit"):
        assert len(of_run[name]) == 3
        confidences = []
        for width, caption, true in of_run[name]:
            assert width == (28 if name == "lenet" else 32)
            predicted, confidence, _ = caption.rsplit(" ", 2)
            assert true != f"true: {predicted}"
            confidences.append(int(confidence))
        assert confidences == sorted(confidences, reverse=True)


def test_only_differences_are_shown(opened):
    rows = opened.execute_script(
        """return [...document.querySelectorAll("#differences table")[0].rows].map(row => [...row.cells].map(c => c.innerText))"""
    )
    table = {key: values for key, *values in rows}
    assert table["key"] == ["failed", "googlenet", "lenet", "resnet18", "vit"]
    assert table["model.name"] == ["lenet", "googlenet", "lenet", "resnet18", "vit_tiny"]
    assert table["seed"] == ["1234", "1234", "1234", "1234", "1234 7"]
    assert "train.optim.momentum" not in table
    assert all(len(set(values)) > 1 for values in table.values())


def test_charts_follow_dark_and_light_mode(opened):
    def colors():
        return opened.execute_script(
            """return [getComputedStyle(document.body).backgroundColor,
                Bokeh.documents[0].get_model_by_name("curves-x").axis_label_text_color]"""
        )

    light = colors()
    choose_scheme(opened, "dark")
    wait_for(opened, f"return getComputedStyle(document.body).backgroundColor !== '{light[0]}'")
    dark = colors()
    assert dark[1] != light[1]
    luminance = [sum(int(dark[1][i : i + 2], 16) for i in (1, 3, 5)), sum(int(light[1][i : i + 2], 16) for i in (1, 3, 5))]
    assert luminance[0] > 3 * 200
    assert luminance[1] < 3 * 60


def test_on_a_phone_the_page_fits_the_screen(chromium, page):
    open_page(chromium, page, width=390)
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
    charts = chromium.execute_script("return [...document.querySelectorAll('#curves > *')].map(chart => chart.offsetWidth)")
    assert 300 < charts[0] <= 390


# Without a browser


@pytest.mark.slow
def test_page_of_twenty_long_runs_is_below_five_megabytes(small_runs, tmp_path):
    lines = (small_runs["googlenet"] / "metrics.jsonl").read_text().splitlines()
    for i in range(20):
        run = tmp_path / "runs" / f"run-{i:02d}"
        shutil.copytree(small_runs["googlenet"], run, symlinks=True, ignore=shutil.ignore_patterns("ckpt", "tensorboard"))
        change_config(run, model={**yaml12.parse((run / "config.yaml").read_text())["model"], "pdrop": i / 100})
        many = (json.loads(lines[n % len(lines)]) | {"step": n, "elapsed": 1.2345 * n, "epoch": 0.0123 * n} for n in range(3000))
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in many))
    compare(tmp_path / "runs", "--html", tmp_path / "page.html", "--mistakes", 0)
    with_mistakes = 20 * 8 * 8_000  # of photographs of 128 pixels
    assert (tmp_path / "page.html").stat().st_size + with_mistakes < MOST_BYTES


def test_missing_bokeh_is_named(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.config.command_line.find_spec", lambda name: None)
    compare(runs, "--html", tmp_path / "page.html", code=1)
    message = "error: --html needs packages that are not installed: bokeh; pip install -r requirements-extra.txt\n"
    assert capsys.readouterr().err == message


def test_figure_has_curves_and_accuracy_over_cost(runs, tmp_path, capsys):
    from tools.comparison.figure import draw_comparison
    from tools.comparison.rows import rows_of
    from tools.comparison.runs import read_runs

    compare(runs, "--png", tmp_path / "runs.png", "--x", "epoch")
    assert f"wrote {tmp_path / 'runs.png'}" in capsys.readouterr().out
    assert imread(tmp_path / "runs.png").shape[1] > 1200

    rows = rows_of(read_runs([str(runs)]))
    draw_comparison(figure := Figure(), rows, "epoch")
    curves, macs, _ = figure.axes
    assert len(curves.lines) == 6
    lines = [line for line in metrics(runs / "googlenet") if "valid/acc@1" in line]
    assert list(curves.lines[1].get_xdata()) == pytest.approx([line["epoch"] for line in lines], rel=1e-5)
    assert list(curves.lines[1].get_ydata()) == pytest.approx([100 * line["valid/acc@1"] for line in lines], rel=1e-5)
    assert macs.get_xlabel() == "multiply-accumulates of an image"
    points = {float(bars[0].get_xdata()[0]): float(bars[0].get_ydata()[0]) for bars in macs.containers}
    for name in ("lenet", "resnet18", "googlenet"):
        expected = results(runs / name)
        assert points[expected["macs"]] == pytest.approx(100 * expected["best"]["valid/acc@1"])
    assert len(points) == 4  # the failed run has none
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["failed (failed)", "googlenet", "lenet", "resnet18", "vit, 2 seeds"]


def test_each_monitored_metric_has_its_own_panels(runs, tmp_path):
    from tools.comparison.figure import draw_comparison
    from tools.comparison.rows import rows_of
    from tools.comparison.runs import read_runs

    shutil.copytree(runs / "lenet", tmp_path / "other", symlinks=True)
    for name in ("results.json", "metrics.jsonl"):
        path = Path(tmp_path / "other" / name)
        path.write_text(path.read_text().replace("acc@1", "mIoU"))
    draw_comparison(figure := Figure(), rows_of(read_runs([str(runs / "lenet"), str(tmp_path / "other")])), "step")
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["valid/acc@1 (%)", "valid/mIoU (%)"]
    assert [len(axes.lines) for axes in figure.axes[::3]] == [1, 1]

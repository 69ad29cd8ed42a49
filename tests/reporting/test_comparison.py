"""Statistics of a comparison (spreads, marks, tokens to a loss, claims), its page and its plots."""

import csv
import math
import shutil
import subprocess
from typing import Any

import pytest

from tli_jax.comparison.measured import reached
from tli_jax.comparison.statistics import analyse
from tli_jax.reporting import comparison
from tli_jax.reporting.page import write_report
from tli_jax.reporting.results import FAILS, HOLDS, UNDECIDED, UNKNOWN


def row(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["summary"] if row["name"] == name)


def test_tokens_to_a_loss() -> None:
    curve = [[0, 3.0], [100, 2.0], [200, 2.5], [300, 1.5]]
    assert reached(curve, 3.0) == 0
    assert reached(curve, 2.25) == pytest.approx(75)
    assert reached(curve, 1.75) == pytest.approx(275)
    assert reached(curve, 1.0) is None


def test_means_and_spreads(results) -> None:
    ours = row(results, "tli:identity")
    assert ours["final"] == {"mean": pytest.approx(2.42), "sd": pytest.approx(0.0158, abs=1e-4)}
    assert (ours["initial"], ours["change"]) == ({"mean": 3.0, "sd": 0.0}, 0.0)
    assert row(results, "dus")["change"] == pytest.approx(0.5)
    # The base ends at 2.50 to 2.54. The first segment reaches these after 960 tokens on average.
    assert ours["to_rival"]["mean"] == pytest.approx(960)
    assert row(results, "dus")["to_base"]["mean"] == pytest.approx(714.3, abs=0.1)
    assert ours["contributions"] == pytest.approx({"2": 0.1, "5": -0.1})
    assert ours["flops"] == 3e6 * 2 * 1000  # FLOPs of a token, for two thousand tokens


def test_best_and_indistinguishable_are_marked(results) -> None:
    marks = {name: row(results, name)["marks"] for name in ("base", "tli:identity", "dus")}
    assert [marks[name]["final"] for name in marks] == ["", "best", ""]
    assert [marks[name]["initial"] for name in marks] == ["best", "alike", ""]
    # The mean is higher, but its confidence interval contains 0. Then nothing is best.
    losses = (2.39, 2.42, 2.43, 2.50, 2.46)
    for one, loss in zip([r for r in results["runs"] if r["name"] == "dus"], losses, strict=True):
        one["curve"][-1][1] = loss
    results |= analyse(results)
    assert [row(results, name)["marks"]["final"] for name in marks] == ["", "alike", "alike"]


def test_claims(results) -> None:
    verdicts = {claim["claim"]: claim for claim in results["claims"]}
    assert verdicts["lower initial loss than dus"]["verdict"] == HOLDS
    assert verdicts["lower initial loss than moe"]["verdict"] == UNDECIDED  # its seeds lie on both sides
    assert verdicts["fewer steps than dus"]["verdict"] == HOLDS
    assert verdicts["fewer steps than moe"]["verdict"] == UNKNOWN  # was not trained
    assert verdicts["better without any training than base"]["verdict"] == FAILS  # equal is not better
    assert verdicts["better without any training than dus"]["verdict"] == HOLDS
    assert "3.0000 against 3.5000" in verdicts["lower initial loss than dus"]["numbers"]
    # Of 20 answers, tli has five more right than the base, ten more than dus, and others than moe.
    on_tasks = {
        rival: verdicts[f"better on tasks without any training than {rival}"] for rival in ("base", "dus", "moe")
    }
    assert [claim["verdict"] for claim in on_tasks.values()] == [HOLDS, HOLDS, UNDECIDED]
    difference = on_tasks["base"]["difference"]
    assert (-difference["mean"], difference["error"]) == pytest.approx((0.25, 1.96 * math.sqrt(3 / 16 / 19)))
    assert on_tasks["moe"]["numbers"].startswith("accuracy 0.7500 against 0.7500, +0.0000 ± 0.3")
    assert len(results["claims"]) == 10


def test_tasks(results) -> None:
    ours = row(results, "tli:identity")
    assert ours["accuracy_before"] == {"mean": 0.75, "sd": 0.0} == ours["accuracy_after"]
    assert ours["tasks"] == {"lines": (0.75, 0.75)}
    assert [row(results, name)["marks"]["accuracy_after"] for name in ("tli:identity", "dus")] == ["best", ""]
    assert comparison.cells(row(results, "dus"))["accuracy"] == "25.0 % → 25.0 %"
    for one in (*results["starts"], *results["runs"]):
        one |= {"tasks": {}, "accuracy": None}
    results |= analyse(results)
    assert "accuracy" not in comparison.cells(row(results, "dus"))
    verdicts = {claim["claim"]: claim["verdict"] for claim in results["claims"]}
    assert verdicts["better on tasks without any training than dus"] == UNKNOWN


def test_one_seed_gives_no_verdict_on_training(results) -> None:
    results["runs"] = [one for one in results["runs"] if one["seed"] == 0]
    results["config"]["seeds"] = 1
    results |= analyse(results)
    verdicts = {claim["claim"]: claim["verdict"] for claim in results["claims"]}
    assert verdicts["fewer steps than dus"] == UNDECIDED
    assert verdicts["lower initial loss than dus"] == HOLDS  # neither model is random
    assert verdicts["lower initial loss than moe"] == UNDECIDED  # its routers are
    assert row(results, "dus")["marks"]["final"] == row(results, "tli:identity")["marks"]["final"] == ""
    assert row(results, "dus")["final"]["sd"] is None


def test_diverged_run_is_not_averaged(results) -> None:
    bad = next(one for one in results["runs"] if one["name"] == "dus")
    bad["diverged"] = "step 3"
    results |= analyse(results)
    assert row(results, "dus")["final"] is None and row(results, "dus")["diverged"] == 1
    assert comparison.cells(row(results, "dus"))["final"] == "diverged"
    verdicts = {claim["claim"]: claim["verdict"] for claim in results["claims"]}
    assert verdicts["fewer steps than dus"] == UNKNOWN


def test_report_is_written(results, tmp_path) -> None:
    for one in (*results["starts"], *results["runs"]):
        one["tasks"]["others"] = one["tasks"]["lines"]  # a single task is a column of the main table
    results |= analyse(results)
    write_report(results, "model: embedded\n", tmp_path)
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and rows[1]["name"] == "tli:identity" and float(rows[1]["final_loss"]) == 2.4
    for name in ("initial_loss.png", "loss_curves.png", "forgetting.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page
    assert "stack was left out: too large" in page
    assert "<h1>embedded: 3 ways to grow it</h1>" in page
    # Claims without a measurement are collapsed.
    assert page.count("<summary>not measured: 1</summary>") == 1 and ">not measured</td>" not in page
    assert "<td>75.0 → 75.0</td>" in page
    for outside in ("src=", "href=", "@import"):
        assert outside not in page.split("</style>")[0] + page.split("</script>")[-1]


def test_names_in_the_page_are_text(results, tmp_path) -> None:
    """Names from configurations, paths and task files must not run in the page."""
    name = "<img src=x onerror=alert(1)>$a_b$[red]\x1b\u202e\udcff"
    for one in (*results["starts"], *results["runs"]):
        one["tasks"] = {name: one["tasks"]["lines"], "other": one["tasks"]["lines"]}
        one["name"] = {"dus": name.split("\x1b")[0]}.get(one["name"], one["name"])
    results["left_out"] = {name: name}
    results["config"]["model"] = results["command"] = name
    results |= analyse(results)
    write_report(results, f"model: {name}\n", tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;$a_b$[red]") > 10
    assert not any(character in page.split("<script>")[0] for character in "\x1b\u202e\udcff")
    assert r"\x1b\u202e\udcff" in page


@pytest.fixture
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no Chromium here")


def test_page_in_a_browser(results, tmp_path, browser) -> None:
    from matplotlib.image import imread

    write_report(results, "model: embedded\n", tmp_path)
    page = tmp_path / "report.html"
    # The title tells the width of the page.
    script = "<script>addEventListener('load', () => document.title = document.documentElement.scrollWidth)</script>"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--hide-scrollbars", "--virtual-time-budget=4000"]

    def call(*more: str) -> str:
        command = [browser, *flags, *more, page.as_uri()]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout

    for width in (500, 1500):
        seen = call("--dump-dom", f"--window-size={width},900")
        assert f"<title>{width}</title>" in seen  # tables scroll, the page does not
        assert seen.count('class="main-svg"') >= 4 and seen.count("<tr>") > 15  # two figures, drawn
    shades = []
    for name, scheme in (("light", 1), ("dark", 0)):
        call(
            f"--screenshot={tmp_path / name}.png",
            "--window-size=900,600",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        shades.append(float(imread(tmp_path / f"{name}.png")[:40, :40, :3].mean()))
    assert shades[0] > 0.9 > 0.2 > shades[1]

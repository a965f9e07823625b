"""The benchmark's tables, goals and blocks of pages, from results made up here: no clock is read."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import cases
import report
import run

GOALS = {"forward": {"eager": 8, "compile": 2}, "forward+backward": {"eager": 9, "peak": 2.1}}


def result(system, seconds, case="CE 2048x32000", mode="forward", **extra):
    return {"case": case, "mode": mode, "system": system, "status": "ok", "samples": [seconds] * 5, **extra}


def facts(**changes):
    shape, size = [2048, 32000], 2048 * 32000 * 4
    moved = {"forward": [size, 0], "forward+backward": [size, size]}
    base = {"shape": shape, "dtype": "float32", "loss": "cross_entropy", "bytes": size, "fewest_bytes": moved}
    return {**base, "exps": size // 4, "linear": False, "goals": GOALS, "detail": False, **changes}


def data(results, device="cpu", date="2026-01-02T03:04:05Z", cases=None, **changes):
    environment = {"device": device, "name": "a chip", "cpu": "a chip, 2 processors", "threads": 2, "torch": "2.13.0"}
    environment |= {"python": "3.12.1", "compiler": "c++ 12", "commit": "abc1234", "date": date, "load": 0.0}
    environment |= {"driver": "580", "cuda": "13.0"}
    base = {"environment": environment, "roofline": {"copy": 20e9, "read": 25e9, "exp": 5e9}, "complete": True}
    return {**base, "left_out": [], "cases": cases or {"CE 2048x32000": facts()}, "results": results, **changes}


def only(results, **changes):
    (line,) = report.lines(data(results, **changes))
    return line


def test_ratio_and_goal():
    line = only([result("fastloss", 0.020), result("eager", 0.160), result("compile", 0.039)])
    eager, compiled = line.against["eager"], line.against["compile"]
    assert (eager.figure, eager.met, eager.text) == (pytest.approx(8), True, "8.00x (goal 8x)")
    assert (compiled.figure, compiled.met, compiled.text) == (pytest.approx(1.95), False, "1.95x (**goal 2x missed**)")


def test_median_not_mean():
    line = only([result("fastloss", 1) | {"samples": [1, 1, 1, 1, 100]}, result("eager", 2)])
    assert line.against["eager"].figure == 2


def test_roofline_is_the_slower_of_memory_and_arithmetic():
    facts_ = facts()
    read, exps = 2048 * 32000 * 4 / 25e9, 2048 * 32000 / 5e9
    assert exps > read  # here the exponentials bind
    assert report.floor_seconds(facts_, "forward", {"copy": 20e9, "read": 25e9, "exp": 5e9}) == pytest.approx(exps)
    assert report.floor_seconds(facts_, "forward", {"copy": 20e9, "read": 25e9}) == pytest.approx(read)
    both = 2 * 2048 * 32000 * 4 / 20e9
    assert report.floor_seconds(facts_, "forward+backward", {"copy": 20e9, "exp": 5e9}) == pytest.approx(both)
    assert report.floor_seconds(facts(bytes=2560), "forward", {"copy": 20e9}) is None


def test_copy_bandwidth_goal():
    cases = {"CE 2048x32000": facts(goals={"forward": {"copy": 0.9}})}
    seconds = 2048 * 32000 * 4 / 20e9
    met, missed = (
        only([result("fastloss", seconds / share)], cases=cases, roofline={"copy": 20e9}).against["copy"]
        for share in (0.95, 0.85)
    )
    assert met.met and met.text == "95% (goal 90%)"
    assert not missed.met and missed.text == "85% (**goal 90% missed**)"


@pytest.mark.parametrize("peak, met", [(1.0, True), (2.0, False)])
def test_memory_goal(peak, met):
    size = facts()["bytes"]
    line = only(
        [
            result("fastloss", 1, mode="forward+backward", peak=int(peak * size)),
            result("eager", 9, mode="forward+backward"),
        ]
    )
    assert line.memory["fastloss"] == pytest.approx(1 + peak)
    assert line.against["peak"].met is met


def test_latency_goal_counts_the_hosts_time_where_it_was_measured():
    cases = {"CE 2048x32000": facts(goals={"forward": {"within_us": 10}})}
    near = only([result("fastloss", 20e-6), result("eager", 12e-6)], cases=cases).against["eager"]
    assert near.met and "+8.0 us per call (goal +10 us)" in near.text
    host = [result("fastloss", 5e-6, wall=30e-6), result("eager", 6e-6, wall=12e-6)]
    far = only(host, cases=cases).against["eager"]
    assert not far.met and "+18.0 us per call (**goal +10 us missed**)" in far.text


def test_a_wrong_system_gets_no_time_and_is_a_shortfall():
    wrong = {"case": "CE 2048x32000", "mode": "forward", "system": "fastloss", "status": "WRONG", "error": 3.0}
    broken = data([wrong, result("eager", 0.1)])
    assert "WRONG" in report.table(broken)
    assert report.shortfalls(broken) == ["CE 2048x32000, forward: WRONG"]


def test_a_rival_without_a_time_leaves_its_goal_open():
    short = report.shortfalls(data([result("fastloss", 0.01), result("eager", 0.1)]))
    assert short == ["CE 2048x32000, forward: compile: no time for compile"]


def test_a_goal_beyond_the_bare_products_says_so():
    """Of a head: no loss from hidden states can be faster than its products."""
    cases = {"CE 2048x32000": facts(linear=True, goals={"forward": {"torch-chunked": 4, "eager": 4}})}
    times = {"fastloss": 1.0, "torch-chunked": 2.5, "eager": 3.9, "gemms": 0.95}
    line = only([result(system, t) for system, t in times.items()], cases=cases)
    assert line.against["torch-chunked"].text == (
        "2.50x (**goal 4x missed**), out of reach: the bare products are 2.63x faster"
    )
    assert line.against["eager"].text == "3.90x (**goal 4x missed**)"


def test_no_shortfall_when_all_is_well():
    good = data([result("fastloss", 0.01), result("eager", 0.1), result("compile", 0.03)])
    assert report.shortfalls(good) == []
    assert report.summary(good) == "0 of 4 goals missed."
    assert "Left" in report.summary({**good, "left_out": ["Left"]})


def test_the_short_table_sums_up_the_details():
    cases = {"CE 2048x32000": facts(), "CE 7x9": facts(detail=True)}
    results = [result("fastloss", 1), result("eager", 9), result("compile", 3)]
    results += [result("fastloss", 1, case="CE 7x9"), result("eager", 1.25, case="CE 7x9")]
    full, short = (report.table(data(results, cases=cases), detail) for detail in (True, False))
    assert "| CE 7x9, forward |" in full
    assert "| CE 7x9, forward |" not in short and "the slowest is 1.25x eager (CE 7x9, forward)" in short


def test_table_is_rectangular():
    results = [result("fastloss", 1), result("eager", 9), result("cce", 3, case="other")]
    cases = {"CE 2048x32000": facts(), "other": facts(linear=True)}
    rows = report.table(data(results, cases=cases)).splitlines()
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 4


def test_replace_block():
    text = "a\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nb\n<!-- bench:cuda --><!-- /bench:cuda -->\n"
    once = report.replace_block(text, "cpu", "new")
    assert once == text.replace("old", "new")
    assert report.replace_block(once, "cpu", "new") == once
    assert report.replace_block(text, "cuda", "x").endswith("<!-- bench:cuda -->\nx\n<!-- /bench:cuda -->\n")


@pytest.mark.parametrize("text", ["", "<!-- bench:cpu -->", "<!-- /bench:cpu --><!-- bench:cpu -->"])
def test_replace_block_needs_its_markers(text):
    with pytest.raises(ValueError, match="bench:cpu"):
        report.replace_block(text, "cpu", "new")


def test_newest_complete_file_wins(tmp_path):
    def put(name, **changes):
        (tmp_path / name).write_text(json.dumps(data([result("fastloss", 1)], **changes)))

    put("cpu-a.json", date="2026-03-01T00:00:00Z")
    put("cpu-b.json", date="2026-01-01T00:00:00Z")
    put("cpu-c.json", date="2026-04-01T00:00:00Z", complete=False)
    put("cuda-a.json", device="cuda", complete=False, left_out=["CE 64x10"])
    found = report.newest(tmp_path)
    assert {device: path.name for device, (path, _) in found.items()} == {"cpu": "cpu-a.json", "cuda": "cuda-a.json"}
    assert "Not in it: CE 64x10." in report.page_block("cuda", found, tmp_path)


def test_pages_are_generated_from_the_results(tmp_path):
    page, readme = tmp_path / "docs/benchmarks.md", tmp_path / "README.md"
    page.parent.mkdir()
    page.write_text("<!-- bench:cpu --><!-- /bench:cpu -->\n<!-- bench:cuda --><!-- /bench:cuda -->\n")
    readme.write_text("Before.\n<!-- bench:headlines --><!-- /bench:headlines -->\nAfter.\n")
    measured = data([result("fastloss", 0.01), result("eager", 0.1), result("compile", 0.03)])
    path = report.write(measured, tmp_path / "results")
    assert path.name == "cpu-20260102T0304-abc1234.json"
    assert json.loads(path.read_text()) == measured and path.with_suffix(".md").exists()
    assert report.main(["--pages", "--root", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    text = page.read_text()
    assert "10.0x (goal 8x)" in text and f"../results/{path.stem}.md" in text
    assert "No GPU result has been recorded yet." in text


def test_headlines_are_rows_of_the_newest_results(tmp_path):
    case, words = next(iter(report.HEADLINES.items()))
    assert set(report.HEADLINES) <= {c.name for c in cases.CPU}, "a case that is not measured"
    seconds = {"fastloss": 0.010, "eager": 0.1, "compile": 0.03}
    results = [result(system, t, case=case, mode="forward+backward") for system, t in seconds.items()]
    found = {"cpu": (tmp_path / "cpu.json", data(results, cases={case: facts()}))}
    assert report.headlines(found).splitlines()[2:] == [f"| {words} | 10 ms | 100 ms, 10.0x | 30 ms, 3.00x |"]
    assert report.headlines({}) == "No CPU result has been recorded yet."


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    cases, results = {}, []
    for classes in (256, 1024, 4096):
        name = f"CE 32768x{classes} bfloat16"
        cases[name] = facts(shape=[32768, classes])
        results += [result("fastloss", 1e-4, case=name), result("liger", 3e-4, case=name)]
    report.render(data(results, device="cuda", cases=cases), tmp_path / "cuda.json")
    for picture in ("cuda.png", "cuda-throughput.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and picture in (
            tmp_path / "cuda.md"
        ).read_text()


def test_a_run_that_is_stopped_keeps_what_it_has(monkeypatch):
    """SIGTERM in the second of three cases."""
    cases = run.CASES["cpu"][:3]

    def measure(bench, case):
        if case is cases[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        yield result("fastloss", 0.020, case=case.name)

    monkeypatch.setattr(run.Bench, "case", measure)
    monkeypatch.setattr(run, "cpu_roofline", lambda threads: {"copy": 20e9})
    before = signal.signal(signal.SIGTERM, run.out_of_time)
    try:
        found = run.run("cpu", torch.get_num_threads(), cases)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [r["case"] for r in found["results"]] == [cases[0].name]
    assert found["left_out"] == [case.name for case in cases[1:]] and not found["complete"]


SMALL = {1: (6,), 2: (6, 5), 4: (2, 3, 4, 2)}
KINDS = {  # one case for every loss and number of dimensions, without the products of matrices
    (c.loss, len(c.shape), c.soft, c.weight, c.smoothing, c.pos_weight): dataclasses.replace(
        c, shape=SMALL[len(c.shape)], dtype="float64"
    )
    for c in (*cases.CPU, *cases.CUDA)
    if not c.hidden
}


@pytest.mark.parametrize("case", KINDS.values(), ids=lambda case: case.name)
def test_the_reference_is_what_the_rivals_compute(case):
    problem = cases.Problem(case, "cpu")
    x = problem.x.clone().requires_grad_()
    value = problem.torch_loss()(x, problem.target)
    expected, grad = problem.reference()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], grad)


def test_small_calls_have_their_goals():
    """Goals against eager for calls that are all overhead, and from 16 Ki elements up; on one thread, both by turns."""
    small = [c for c in cases.CPU if c.threads == 1]
    assert {"cross_entropy", "l1_loss", "mse_loss"} <= {c.loss for c in small if c.numel <= 640}
    for case in small:
        fewest = {"within_us": 6} if case.numel <= 640 else {"eager": 1}
        assert case.goals["forward"] == fewest
        assert case.goals["forward+backward"]["eager"] >= (0.87 if case.numel <= 640 else 1)

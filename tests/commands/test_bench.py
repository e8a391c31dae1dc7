"""`mtlflashattn bench`: what it counts, what it compares, and what it writes."""

import dataclasses
import functools
import html.parser
import json
import re
import types

import pytest
import torch

from flash_attn_mps import tiers, timing
from flash_attn_mps.frontends import fa2
from flash_attn_mps.tools.bench import chart, contenders, measure, memory, page, report, workloads
from flash_attn_mps.tools.bench.contenders import STOCK, Contender
from flash_attn_mps.tools.bench.measure import Measurement
from flash_attn_mps.tools.bench.workloads import Workload
from flash_attn_shim.commands import main

SMALL = [
    Workload("prefill", "float32", 16, 2, 2, ((40, 40),) * 2),
    Workload("prefill", "bfloat16", 16, 4, 2, ((40, 40),), causal=False),
    Workload("decode", "float32", 16, 4, 2, ((1, 70),) * 2),
    Workload("decode", "float16", 16, 4, 2, ((4, 80),) * 2, page_size=16),
    Workload("decode", "bfloat16", 16, 4, 2, ((2, 96),) * 2, codes="int8"),
    Workload("decode", "float16", 16, 4, 2, ((1, 80),), page_size=8, codes="uint8"),
    Workload("varlen", "float32", 16, 2, 2, ((30, 30), (1, 1), (7, 7))),
    Workload("window", "float32", 16, 2, 2, ((64, 64),), window=9),
    Workload("training", "bfloat16", 16, 4, 2, ((40, 40),)),
    Workload("training", "float32", 16, 2, 2, ((30, 30), (1, 1), (7, 7)), causal=False),
]
REAL = timing.stopwatch("cpu")


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
def test_the_least_that_a_workload_costs(workload):
    pairs = 0
    for queries, keys in workload.lengths:
        for i in range(queries):
            at = i + keys - queries
            pairs += sum(
                (j <= at or not workload.causal) and (workload.window < 0 or j >= at - workload.window)
                for j in range(keys)
            )
    assert workload.pairs == pairs
    x = workloads.inputs(workload, "cpu")
    products, moved = 2, (x.q, x.q, x.k, x.v)
    if workload.kind == "training":
        # Backward: scores, dp, dq, dk and dv; it reads q, k, v, the output and its gradient, and writes dq, dk and dv.
        products, moved = products + 5, (*moved, x.q, x.k, x.v, x.q, x.dout, x.q, x.k, x.v)
    assert workload.flops == pairs * workload.heads * workload.head_dim * 2 * products
    assert workload.bytes == sum(t.numel() * t.element_size() for t in moved)


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
def test_everybody_computes_the_same(workload, metal):
    entrants = contenders.contenders("cpu", full=True, hub=False)
    assert [c.name for c in entrants][-1] == STOCK
    found = measure.measure(workload, entrants, "cpu", 0.0, lambda call, times: 1e-3)
    ours = {tier.name for tier in tiers.BY_NAME.values() if tier.backward is not None or workload.kind != "training"}
    others = {"cpu", "tensorops"} | ({"decode"} if workload.kind != "decode" else set())  # no M5 here
    served = {f"mtlflashattn {name}" for name in ours - others} | ({STOCK} if not workload.codes else set())
    assert {m.contender for m in found if m.seconds} >= served
    assert not any(m.differs for m in found), [(m.contender, m.error) for m in found]
    refused = [m for m in found if not m.seconds]
    assert not served & {m.contender for m in refused}
    assert all(m.why_not for m in refused)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("full", [False, True])
def test_the_sets_have_every_kind_and_distinct_names(device, full):
    found = workloads.workloads(device, full)
    assert {w.kind for w in found} == set(workloads.KINDS)
    assert len({w.name for w in found}) == len(found)
    assert all(len(set(w.lengths)) == 1 for w in found if not w.packed)
    assert all(q == k for w in found if w.packed for q, k in w.lengths)


def entrant(name, call, ours=False):
    return Contender(name, lambda workload, x: lambda: (call(x),), ours)


def wrong(x):
    return fa2.flash_attn_func(x.q, x.k, x.v)  # not causal


def right(x):
    return fa2.flash_attn_func(x.q, x.k, x.v, causal=True)


def fail(x):
    raise RuntimeError("Invalid buffer size: 64.00 GiB\nand more")


def unable(workload, x):
    raise contenders.Unsupported("it takes no such thing")


def test_wrong_results_failures_and_refusals_are_told_apart():
    field = [
        entrant("right", right),
        entrant("wrong", wrong),
        entrant("nan", lambda x: right(x) * torch.nan),
        entrant("failing", fail),
        Contender("unable", unable),
    ]
    found = {m.contender: m for m in measure.measure(SMALL[0], field, "cpu", 0.0, REAL)}
    assert {name for name, m in found.items() if m.differs} == {"wrong", "nan"}
    assert found["failing"].why_not == "RuntimeError: Invalid buffer size: 64.00 GiB"
    assert found["unable"].why_not == "it takes no such thing"
    assert found["right"].seconds
    assert found["right"].memory >= 2 * 40 * 2 * 16 * 4, "the output is counted"


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(*arguments):
        grads = backward(*arguments)
        return grads._replace(dk=grads.dk * 1.2)

    backward = tiers.BY_NAME["torch"].backward
    planted = dataclasses.replace(tiers.BY_NAME["torch"], backward=wrong)
    field = [Contender("planted", functools.partial(contenders._ours, planted))]
    for workload in SMALL[-2:]:
        assert [m.differs for m in measure.measure(workload, field, "cpu", 0.0, REAL)] == [True]


def test_rounds_fill_the_budget_and_the_slow_go_once():
    asked = []

    def clock(call, times):
        name = call()
        asked.append(name)
        return {"fast": 0.1, "slow": 5.0}[name]

    def named(name):
        return Contender(name, lambda workload, x: Both(name, (right(x),)))

    class Both:
        """Gives the output twice, to be judged and weighed, and then its name, to be timed."""

        def __init__(self, name, out):
            self.name, self.out, self.calls = name, out, 0

        def __call__(self):
            self.calls += 1
            return self.out if self.calls <= 2 else self.name

    fast, slow = measure.measure(SMALL[0], [named("fast"), named("slow")], "cpu", 0.75, clock)
    assert slow.seconds == (5.0,)
    assert fast.seconds == (0.1,) * 7
    assert asked.count("slow") == 1


def measured(workload, name, seconds, ours=False, error=0.1):
    return Measurement(workload, name, ours, tuple(seconds), error, 3 * 2**20)


FIELD = [
    measured(SMALL[0], "mtlflashattn <simdgroup>", (1e-3, 2e-3, 3e-3), ours=True),
    measured(SMALL[0], STOCK, (4e-3, 4e-3, 4e-3)),
    measured(SMALL[0], "liar", (1e-9,), error=7.0),
    Measurement(SMALL[0], "absent", False, why_not='RuntimeError: <script src="http://x">'),
    measured(SMALL[2], "mtlflashattn <simdgroup>", (1e-3,), ours=True),
    measured(SMALL[2], STOCK, (1e-3,), error=2.0),
]
FACTS = {"torch": "<b>2.13", "device": "mps: Apple M3 & co"}


def test_figures():
    ours, stock = FIELD[:2]
    assert ours.median == 2e-3
    assert ours.spread == pytest.approx(0.25)
    assert ours.tflops == pytest.approx(SMALL[0].flops / 2e-3 / 1e12)
    assert ours.gbytes == pytest.approx(SMALL[0].bytes / 2e-3 / 1e9)
    assert report.against_stock(FIELD[:2], ours) == 2.0
    assert report.against_stock([stock._replace(error=2.0), ours], ours) is None, "wrong results are no yardstick"


def test_the_table_has_every_measurement():
    lines = report.table(FIELD).splitlines()
    assert lines[0] == "prefill: a prompt, or an encoder"
    row = next(line for line in lines if "liar" in line)
    assert "WRONG RESULT: off by 7 times" in row
    row = next(line for line in lines if "<simdgroup>" in line).split()
    assert row[2:4] == ["2.000", "25%"]
    assert row[-2:] == ["3.00", "2.00x"]
    assert any("absent" in line and "RuntimeError" in line for line in lines)
    assert len(lines) == len(FIELD) + 2 * 3 + 1


class Checker(html.parser.HTMLParser):
    """Every element is closed; collects tags, attributes and text."""

    _VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone():
    text = page.render(FACTS, FIELD)
    found = Checker(text)
    assert {"svg", "rect", "table", "style"} <= set(found.tags)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not any(name in ("src", "href", "xlink:href") or name.startswith("on") for name, _ in found.attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    words = " ".join(found.text)
    assert "Apple M3 & co" in words
    assert "2.00 times as fast as stock PyTorch (one workload)" in words
    assert "No comparison with stock PyTorch" in words, "a wrong stock result is none"
    assert set(re.findall(r"var\(--(c\d+)\)", text)) <= set(re.findall(r"--(c\d+):", text))


def test_bars_are_as_long_as_their_values():
    bars = [chart.Bar(str(value), 1, value, f"{value:g}", "") for value in (10.0, 5.0)]
    drawing = chart.bars([chart.Group("both", [*bars, chart.Bar("none", 2, None, "absent", "")])], "TF/s", "title")
    long, short = (float(width) for width in re.findall(r'<rect width="([\d.]+)%"', drawing))
    assert long == pytest.approx(2 * short, abs=0.02)
    assert long <= 80, "there is room for its value beside it, on a phone too"
    assert "none: absent" in drawing
    ticks = re.findall(r'class="tick">([^<]*)<', drawing)
    assert ticks == ["0", "2", "4", "6", "8", "10", "TF/s"]


@pytest.mark.parametrize("top", [1e-7, 0.003, 0.1, 1.0, 7.3, 10.0, 999.0])
def test_axes_have_a_few_round_ticks(top):
    assert 3 <= top / chart._step(top) <= 7.5


def test_a_wrong_result_gets_no_bar():
    assert page.render(FACTS, FIELD).count("<rect") == 3
    assert "liar: wrong result" in page.render(FACTS, FIELD)


def test_who_ran_nothing_of_a_kind_is_named_once_and_not_with_each_workload():
    absent = [Measurement(workload, "decode", True, why_not="has 2048 queries") for workload in SMALL[:2]]
    assert {m.workload.kind for m in absent} == {"prefill"}
    html = page.render(FACTS, [*FIELD, *absent])
    assert html.count("has 2048 queries") == 1
    assert ">decode: has 2048 queries<" in html
    ran = measured(SMALL[1], "decode", (1e-3,), ours=True)
    assert page.render(FACTS, [*FIELD, absent[0], ran]).count("has 2048 queries") > 1


def test_long_texts_of_a_table_are_broken_into_lines_and_numbers_are_not():
    long = "RuntimeError: MPS backend out of memory (MPS allocated: 50.1 GB)"
    html = page.rows(("", "before", "now"), [("memory", "1.5e3", long), ("time", "-", "12.0x")])
    assert html.count("<th") == 3
    assert 'class="word">memory<' in html
    assert 'class="number" data-name="before">1.5e3<' in html
    assert f'class="text" data-name="now">{long}<' in html
    assert "<table class=texts>" in html, "on a phone the cells of a row are below each other"
    assert "texts" not in page.rows(("case", "ms"), [("a", "1.0")])
    assert "<th" not in page.rows(("", ""), [("a", "1.0")])


def test_peak_memory_of_a_call():
    def call():
        temporary = torch.ones(1 << 20)
        out = temporary[:1024].clone()
        del temporary
        return out, torch.ones(1 << 18)

    assert memory.peak(call, "cpu") == pytest.approx(4 * (1 << 20) + 4096, rel=0.01)


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
def test_other_packages_are_called_as_their_interfaces_want(workload, monkeypatch):
    """With this project's functions in their place, behind FlashAttention-2's interface and one with heads first."""
    seen = []

    def heads_first(q, k, v, is_causal=False, window_size=0):
        seen.append(q.is_contiguous())
        window = (window_size, 0) if window_size else (-1, -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return fa2.flash_attn_func(q, k, v, causal=is_causal, window_size=window).transpose(1, 2)

    modules = {
        "metal_flash_attn": fa2,
        "mps_flash_attn": types.SimpleNamespace(flash_attention=heads_first),
        "kernels": types.SimpleNamespace(get_kernel={"kernels-community/metal-flash-sdpa": fa2}.__getitem__),
    }
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: name in modules or None)
    monkeypatch.setattr(contenders.importlib, "import_module", modules.__getitem__)
    entrants = contenders.contenders("mps", full=False, hub=True)
    assert [c.name for c in entrants[-3:]] == ["metal_flash_attn", "mps_flash_attn", "metal-flash-sdpa"]
    assert "metal-flash-sdpa" not in {c.name for c in contenders.contenders("mps", full=False, hub=False)}
    found = measure.measure(workload, entrants[-3:], "cpu", 0.0, lambda call, times: 1e-3)
    assert not any(m.differs for m in found), found
    cache = "is not timed on pages and quantised caches" if workload.page_size or workload.codes else ""
    packed = "does not support packed sequences" if workload.packed else ""
    assert [m.why_not for m in found] == [cache, cache or packed, cache]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workloads, "workloads", lambda device_type, full: SMALL)
    files = [tmp_path / "b.json", tmp_path / "b.html"]
    arguments = ["--device", "cpu", "--seconds", "0", "--json", str(files[0]), "--html", str(files[1])]
    assert main(["bench", "prefill", "window", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "prefill: " in printed
    assert "decode: " not in printed
    data = json.loads(files[0].read_text())
    assert {m["kind"] for m in data["measurements"]} == {"prefill", "window"}
    stock = next(m for m in data["measurements"] if m["contender"] == STOCK)
    assert stock["median seconds"] > 0
    assert stock["TF/s"] == pytest.approx(SMALL[0].flops / stock["median seconds"] / 1e12)
    assert data["machine"]["torch"] == torch.__version__
    Checker(files[1].read_text())


def test_the_command_says_what_it_does_not_know(capsys):
    assert main(["bench", "guessing"]) == 2
    assert "unknown kind guessing; choose from: prefill, decode, varlen, window, training" in capsys.readouterr().err


def test_a_wrong_tier_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(workloads, "workloads", lambda device_type, full: SMALL[:1])
    monkeypatch.setattr(contenders, "contenders", lambda *_: [entrant("mtlflashattn broken", wrong, ours=True)])
    assert main(["bench", "--device", "cpu", "--seconds", "0"]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out

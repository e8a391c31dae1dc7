"""One model class: its own eager attention against flash_attention_2, in every case that it has."""

import time
import traceback

import torch
import transformers

from flash_attn_mps import dispatch, trace

from . import find, multimodal, shrink
from .accepted import EAGER, FLASH, OURS
from .build import SDPA, Models
from .cases import Comparison, copied
from .difference import difference, gradient_difference
from .explained import TOLERANCE
from .feed import Feeder, Unfed


class wrong_scale:
    """While this is entered, attention's scores are too small by a fifth: what a comparison must notice.

    With `modules`, only while one of these runs.
    """

    def __init__(self, modules=None):
        self.modules, self.running, self.calls = modules, 0, 0

    def __enter__(self):
        self.attention, self.hooks = dispatch.attention, []
        for module in self.modules or ():
            self.hooks.append(module.register_forward_pre_hook(lambda *_: self._run(1)))
            self.hooks.append(module.register_forward_hook(lambda *_: self._run(-1), always_call=True))

        def attention(p):
            if self.modules is None or self.running:
                self.calls += 1
                p.q = p.q * 0.8
            return self.attention(p)

        dispatch.attention = attention
        return self

    def _run(self, change):
        self.running += change

    def __exit__(self, *_):
        dispatch.attention = self.attention
        for hook in self.hooks:
            hook.remove()


def examine(name, reference=EAGER):
    """What the class named "module:Class" does: {"status", "cases": {case: {"difference", "where", ...}}, ...}."""
    began = time.perf_counter()
    report = {"name": name, "version": transformers.__version__, "cases": {}}
    try:
        _examine(find.model_class(name), report, reference)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next(
            (f for f in reversed(frames) if "/transformers/" in f.filename and "/tests/" not in f.filename), frames[-1]
        )
        report.update(
            status=report.pop("stage", "load"),
            error=f"{type(error).__name__}: {str(error)[:400]}",
            place=f"{place.filename.rpartition('site-packages/')[2]}:{place.lineno}",
            traceback="".join(traceback.format_exc()[-3000:]),
        )
    report["seconds"] = round(time.perf_counter() - began, 2)
    return report


def _examine(cls, report, reference):
    models, feeder, feed = _running(cls, report, reference)
    comparison = Comparison(models, feeder, feed)
    report["stage"] = "load"
    models[FLASH]
    report.pop("stage")
    if models.implementation != FLASH:
        report["implementation"] = models.implementation
    trace.enable()
    trace.calls.clear()
    for case, run in comparison.cases():
        report["cases"][case] = (
            _compare_packed(comparison, reference) if case == "packed" else _compare(case, run, reference)
        )
    for modality, found in multimodal.comparisons(models):
        _compare_modality(modality, found, report["cases"], reference)
    report["calls"] = sum(trace.calls.values())
    report["windows"] = sorted({call.features for call in trace.calls})
    noticed = 0.0
    if "difference" in report["cases"]["forward"]:
        noticed = _noticed(comparison, report, reference)
    report["noticed"] = noticed
    report["status"] = _status(report)


def _noticed(comparison, report, reference):
    """How much attention that is wrong changes the outputs, or the gradients where the outputs hardly do."""
    feed = comparison.feed
    with wrong_scale():
        noticed, _ = difference(comparison.run(reference, feed), comparison.run(FLASH, feed))
        if noticed <= TOLERANCE and "difference" in report["cases"]["gradients"]:
            noticed, _ = gradient_difference(comparison.gradients(reference), comparison.gradients(FLASH))
    return noticed


def _running(cls, report, reference):
    """Models and inputs with which they run: as small as can be; the error of the smallest if none is."""
    failure = None
    for level in (shrink.EVERYTHING, shrink.COUNTS, shrink.NOTHING):
        report["stage"] = "configure"
        try:
            models = Models(cls, level)
            report["stage"] = "build"
            first = models[reference]
            report["stage"] = "feed"
            feeder = Feeder(first)
            feed = _working(feeder, first, report)
        except Exception as error:
            failure = failure or (error, report["stage"])
            if isinstance(error, Unfed):
                break
        else:
            report["shrunk"] = level
            return models, feeder, feed
    error, report["stage"] = failure
    raise error


def _working(feeder, model, report):
    """The first of the feeds with which the model runs; the error of the first if there is none."""
    failure = None
    for feed in feeder.variants():
        report["stage"] = "eager"
        try:
            with torch.no_grad():
                model(**copied(feed))
        except Exception as error:
            failure = failure or error
        else:
            return feed
    raise failure


def _compare(case, run, reference):
    measure_difference = gradient_difference if case.endswith("gradients") else difference
    try:
        expected, mask = run(reference)
    except Exception as error:
        return {"not run": f"{reference} itself fails: {_short(error)}"}
    before = trace.calls.copy()
    keep = () if case.endswith("gradients") else (mask,)
    try:
        got, _ = run(FLASH)
    except Exception as error:
        result = {"error": _short(error), "traceback": traceback.format_exc()[-2500:]}
    else:
        found, where = measure_difference(expected, got, *keep)
        result = {"difference": found, "where": where}
        if found <= TOLERANCE:
            return result
        result["masks"] = sorted({call.features for call in trace.calls - before})
    for other in (SDPA, OURS):
        try:
            result[f"{other} to eager"] = measure_difference(expected, run(other)[0], *keep)[0]
        except Exception as error:
            result[other] = _short(error)
    return result


def _compare_packed(comparison, reference):
    """FlashAttention with sequences in one row, against eager attention with each by itself.

    Where eager attention cannot do the former either, position_ids are no way to pack with this model.
    """
    try:
        apart = comparison.apart(reference)
        together, _ = difference(apart, comparison.packed(reference))
    except Exception as error:
        return {"not run": f"{reference} itself fails: {_short(error)}"}
    if together > TOLERANCE:
        return {"not run": f"{reference} mixes packed sequences too ({together:.0e})"}
    return _compare(
        "packed", lambda attention: (apart if attention == reference else comparison.packed(attention), None), reference
    )


def _compare_modality(modality, comparison, results, reference):
    """`tower` is the difference that attention makes which is wrong in its part alone."""
    if isinstance(comparison, Unfed):
        results[f"with {modality}"] = {"not run": str(comparison)}
        return
    for case, run in comparison.cases():
        results[case] = _compare(case, run, reference)
    if "difference" not in results[f"with {modality}"]:
        return
    expected = comparison.run(FLASH, comparison.feed)
    with wrong_scale(comparison.towers(FLASH)) as wrong:
        got = comparison.run(FLASH, comparison.feed)
    if wrong.calls:
        results[f"with {modality}"]["tower"] = difference(expected, got)[0]


def _status(report):
    cases = report["cases"].values()
    if any("error" in case for case in cases):
        return "error"
    if not report["calls"]:
        return "no call"
    if any(case.get("difference", 0) > TOLERANCE for case in cases):
        return "differs"
    noticed = [report["noticed"], *(case["tower"] for case in cases if "tower" in case)]
    return "equal" if min(noticed) > TOLERANCE else "insensitive"


def _short(error):
    frames = traceback.extract_tb(error.__traceback__)
    place = next(
        (f for f in reversed(frames) if "/transformers/" in f.filename and "/tests/" not in f.filename), frames[-1]
    )
    return (
        f"{type(error).__name__}: {str(error)[:300]} ({place.filename.rpartition('site-packages/')[2]}:{place.lineno})"
    )

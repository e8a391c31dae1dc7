"""One model class: built tiny, with the same weights in eager attention and in flash_attention_2, and compared."""

import contextlib
import copy
import math
import time
import traceback

import numpy
import torch
import transformers
from torch import nn

from flash_attn_mps import dispatch, trace

from . import find, shrink, special
from .feed import LENGTH, PADDED, Feeder, Unfed, masks
from .table import TOLERANCE

NEW_TOKENS, DECODED = 8, 3
_LARGEST = 120_000_000  # parameters; above, the configuration was not made tiny

FLASH, EAGER, SDPA = "flash_attention_2", "eager", "sdpa"


class NotTiny(Exception):
    pass


def configuration(cls, level):
    """A tiny configuration for a model class."""
    config_class = find.configuration_class(cls)
    default = find.default_configuration(config_class)
    special_values = special.CONFIGURATIONS.get(cls.__name__) or special.CONFIGURATIONS.get(config_class.model_type)
    config = shrink.tiny(default, find.sources(cls, default), special_values, level)
    for part in _parts(config):
        if "use_cache" in vars(part):
            part.use_cache = True
        for name in ("reference_compile", "output_attentions"):
            if hasattr(part, name):
                setattr(part, name, False)
        if hasattr(part, "is_decoder") and cls.__name__.endswith(("ForCausalLM", "LMHeadModel", "Decoder")):
            part.is_decoder = True
    return config


def _parts(config):
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict"):
            yield from _parts(value)


def build(cls, config, attention):
    model = cls._from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    return model.eval()


def measure(cls, config):
    """Raise NotTiny if the model would be large; costs no memory."""
    with torch.device("meta"):
        try:
            model = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
        except (NotImplementedError, RuntimeError):
            return  # reads a value while it is built
    count = sum(p.numel() for p in model.parameters())
    if count > _LARGEST:
        name, largest = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise NotTiny(f"{count / 1e6:.0f} million parameters, the largest {name} {tuple(largest.shape)}")


def fill(model):
    """Random weights of a size at which attention matters; the library's own are so small that it hardly does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.dim() >= 2:
                fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 3 else parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            else:
                parameter.nan_to_num_(0.0, 0.0, 0.0)
                if parameter.abs().max() > 1e3:
                    parameter.zero_()
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


class Models:
    """The same weights with several attentions, built when asked for."""

    def __init__(self, cls, level):
        self.cls, self.config = cls, configuration(cls, level)
        measure(cls, self.config)
        self.by_attention = {}

    def __getitem__(self, attention):
        if attention not in self.by_attention:
            torch.manual_seed(0)
            model = build(self.cls, self.config, attention)
            if self.by_attention:
                first = next(iter(self.by_attention.values()))
                model.load_state_dict(first.state_dict())
                for to, of in zip(model.buffers(), first.buffers(), strict=True):
                    to.copy_(of)
            else:
                fill(model)
            self.by_attention[attention] = model
        return self.by_attention[attention]


def outputs(result, prefix=""):
    """name -> floating-point tensor, of whatever a model returns."""
    if isinstance(result, torch.Tensor):
        return {prefix or "output": result} if result.is_floating_point() else {}
    items = (
        result.items() if hasattr(result, "items") else enumerate(result) if isinstance(result, (tuple, list)) else ()
    )
    found = {}
    for name, value in items:
        if str(name) not in ("past_key_values", "attentions", "cross_attentions", "router_logits"):
            found.update(outputs(value, f"{prefix}.{name}" if prefix else str(name)))
    return found


def difference(expected, got, mask=None):
    """The largest difference, relative to the largest value, at tokens that are not padding; and where."""
    worst, where = 0.0, ""
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            return math.inf, f"{name}: shape {tuple(value.shape)} and {tuple(got[name].shape) if name in got else None}"
        other = got[name]
        if mask is not None and _is_tokenwise(value, mask):
            keep = _for_rows(mask, value).bool()
            value, other = value[keep], other[keep]
        if value.numel() == 0:
            continue
        both = torch.isfinite(value) & torch.isfinite(other)
        if not torch.equal(torch.isfinite(value), torch.isfinite(other)):
            return math.inf, f"{name}: not finite at other places"
        error = (
            ((value - other)[both].abs().max() / value[both].abs().max().clamp_min(1e-6)).item() if both.any() else 0.0
        )
        if error > worst:
            worst, where = error, name
    return worst, where


class Comparison:
    """The cases of one model class, for a pair of attentions."""

    def __init__(self, models, feeder, feed):
        self.models, self.feeder, self.feed = models, feeder, feed
        self.generates = bool(getattr(feeder.model, "can_generate", lambda: False)()) and (
            feeder.is_text or feeder.is_seq2seq
        )
        self.causal = self.generates and not feeder.is_seq2seq
        self.pads = "input_ids" in feed and feeder.takes("attention_mask")
        self._reads_padding = {}

    def cases(self):
        """name -> function of an attention that gives (tensors by name, mask of the tokens that count)."""
        yield "forward", lambda attention: (self.run(attention, self.feed), None)
        if self.pads:
            for name, mask in masks().items():
                yield name, lambda attention, mask=mask: (self.padded(attention, mask), mask)
        if self.causal:
            yield "decode", lambda attention: (self.decode(attention), None)
            for cache in ("dynamic", "static"):
                yield f"generate {cache}", lambda attention, cache=cache: (self.generate(attention, cache), None)
            if self.feeder.takes("position_ids"):
                yield "packed", lambda attention: (self.packed(attention), None)
        if self.generates and self.feeder.is_seq2seq:
            yield "generate dynamic", lambda attention: (self.generate(attention, "dynamic"), None)
        yield "gradients", lambda attention: (self.gradients(attention), None)

    def run(self, attention, feed):
        with torch.no_grad():
            torch.manual_seed(0)
            return outputs(self.models[attention](**_copied(feed)))

    def padded(self, attention, mask):
        found = self.run(attention, self.feeder.padded(self.feed, mask))
        reads = self.reads_padding(mask)
        return {n: value.masked_fill(reads[n], 0.0) if n in reads else value for n, value in found.items()}

    def reads_padding(self, mask):
        """name -> which elements of an output that has no entry for each token depend on what is at padding.

        Those are not defined: a pooler takes the first token, which left padding hides. FlashAttention gives zeros
        there, eager attention something else.
        """
        side = int(mask[0, 0])
        if side not in self._reads_padding:
            model, feed = self.models[EAGER], self.feeder.padded(self.feed, mask)
            embedding = model.get_input_embeddings()
            hook = embedding.register_forward_hook(lambda _, inputs, out: _blurred(out, mask))
            try:
                before, after = self.run(EAGER, self.feeder.padded(self.feed, mask)), None
                hook.remove()
                after = self.run(EAGER, feed)
            finally:
                hook.remove()
            self._reads_padding[side] = {
                name: ~torch.isclose(value, after[name], rtol=1e-5, atol=1e-6)
                for name, value in before.items()
                if not _is_tokenwise(value, mask)
            }
        return self._reads_padding[side]

    @torch.no_grad()
    def decode(self, attention):
        """Logits of a prefill and of tokens that follow one by one, the first sequence padded on the left."""
        model, mask = self.models[attention], masks()["padded left"]
        ids = self.feeder.padded(self.feed, mask)["input_ids"]
        prefill = LENGTH - DECODED
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        place = {"position_ids": positions} if self.feeder.takes("position_ids") else {}

        def cut(first, last):
            return {name: value[:, first:last] for name, value in place.items()}

        result = model(ids[:, :prefill], attention_mask=mask[:, :prefill], use_cache=True, **cut(0, prefill))
        if result.past_key_values is None:
            raise ValueError("it gives no cache by itself")
        logits = {"prefill": result.logits[:, -1]}
        for i in range(prefill, LENGTH):
            result = model(
                ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=result.past_key_values,
                use_cache=True, **cut(i, i + 1),
            )  # fmt: skip
            logits[f"token {i}"] = result.logits[:, -1]
        return logits

    @torch.no_grad()
    def generate(self, attention, cache):
        feed = {k: v for k, v in self.feed.items() if k != "decoder_input_ids"}
        if self.causal and self.pads:
            feed = self.feeder.padded(feed, masks()["padded left"])
        kept = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        if cache != "dynamic":
            kept["cache_implementation"] = cache
        model = self.models[attention]
        if self.feeder.is_seq2seq:
            kept["decoder_start_token_id"] = 2
        torch.manual_seed(0)
        tokens = model.generate(**_copied(feed), **kept)
        tokens = getattr(tokens, "sequences", tokens)
        return {"tokens": tokens.float()}

    @torch.no_grad()
    def apart(self, attention):
        """Two sequences, each in a call of its own."""
        parts, places = self._sequences()
        model = self.models[attention]
        logits = [model(p, position_ids=i, use_cache=False).logits for p, i in zip(parts, places, strict=True)]
        return {"logits": torch.cat(logits, 1)}

    @torch.no_grad()
    def packed(self, attention):
        """Two sequences in one row, told apart by position_ids."""
        parts, places = self._sequences()
        ids, positions, model = torch.cat(parts, 1), torch.cat(places, 1), self.models[attention]
        if "mrope_section" in find.source(type(model)) and self.feeder.is_image_text:
            # Of the text, then along time, height and width; some models know the last three alone.
            with contextlib.suppress(ValueError):
                return {"logits": model(ids, position_ids=positions.expand(4, 1, -1), use_cache=False).logits}
        return {"logits": model(ids, position_ids=positions, use_cache=False).logits}

    def _sequences(self):
        ids = self.feed["input_ids"]
        if ids.dim() != 2 or ids.shape[1] != LENGTH:
            raise ValueError("input_ids are not (batch, length)")
        parts = [ids[i : i + 1, :length] for i, length in enumerate((LENGTH - PADDED, LENGTH))]
        return parts, [torch.arange(part.shape[1])[None] for part in parts]

    def gradients(self, attention):
        """Gradients of all parameters, from a fixed random function of the outputs; padded on the right if possible."""
        model = self.models[attention]
        mask = masks()["padded right"] if self.pads else None
        feed = self.feed if mask is None else self.feeder.padded(self.feed, mask)
        ignored = {} if mask is None else self.reads_padding(mask)
        model.zero_grad()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        try:
            torch.manual_seed(0)
            numpy.random.seed(0)
            found = outputs(model(**_copied(feed)))
            generator, loss = torch.Generator().manual_seed(2), 0.0
            for name, value in found.items():
                if not value.requires_grad:
                    continue
                weight = torch.randn(value.shape, generator=generator)
                if name in ignored and ignored[name].shape == weight.shape:
                    weight = weight.masked_fill(ignored[name], 0.0)
                if mask is not None and _is_tokenwise(value, mask):
                    rows = _for_rows(mask, value)
                    weight = weight * rows.view(*rows.shape, *[1] * (value.dim() - 2))
                loss = loss + torch.where(torch.isfinite(value), value * weight, 0.0).sum()
            loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.numel()}
        finally:
            model.eval()
            model.zero_grad()


def _blurred(embedded, mask):
    """Embeddings with something else at padding."""
    if embedded.shape[-2:-1] != mask.shape[-1:]:
        return embedded
    noise = torch.randn(embedded.shape[-1], generator=torch.Generator().manual_seed(3))
    return embedded + (_for_rows(mask, embedded) == 0)[..., None] * noise


def _is_tokenwise(value, mask):
    """Has a tensor an entry for each token? Its rows may be the batch times choices, or codebooks."""
    return value.dim() > 1 and value.shape[1] == mask.shape[1] and value.shape[0] % mask.shape[0] == 0


def _for_rows(mask, value):
    """The mask for each of its rows."""
    return mask.repeat_interleave(value.shape[0] // mask.shape[0], 0)


def _copied(feed):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in feed.items()}


def gradient_difference(expected, got):
    """Relative to the largest gradient of all: some parameters' own are nothing but rounding (a key's bias)."""
    if expected.keys() != got.keys():
        return math.inf, f"gradients of other parameters: {sorted(expected.keys() ^ got.keys())[:3]}"
    scale = max((g.abs().max().item() for g in expected.values()), default=1.0) or 1.0
    errors = {name: (expected[name] - got[name]).abs().max().item() / scale for name in expected}
    where = max(errors, key=errors.get, default="")
    return errors.get(where, 0.0), where


class wrong_scale:
    """While this is entered, attention's scores are too small by a fifth: what a comparison must notice."""

    def __enter__(self):
        self.attention = dispatch.attention

        def attention(p):
            p.q = p.q * 0.8
            return self.attention(p)

        dispatch.attention = attention

    def __exit__(self, *_):
        dispatch.attention = self.attention


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
    trace.enable()
    trace.calls.clear()
    for case, run in comparison.cases():
        report["cases"][case] = (
            _compare_packed(comparison, reference) if case == "packed" else _compare(case, run, reference)
        )
    report["calls"] = sum(trace.calls.values())
    report["windows"] = sorted({call.mask for call in trace.calls})
    with wrong_scale():
        noticed, _ = difference(comparison.run(reference, feed), comparison.run(FLASH, feed))
    report["noticed"] = noticed
    report["status"] = _status(report)


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
                model(**_copied(feed))
        except Exception as error:
            failure = failure or error
        else:
            return feed
    raise failure


def _compare(case, run, reference):
    measure_difference = gradient_difference if case == "gradients" else difference
    try:
        expected, mask = run(reference)
    except Exception as error:
        return {"not run": f"{reference} itself fails: {_short(error)}"}
    before = trace.calls.copy()
    try:
        got, _ = run(FLASH)
    except Exception as error:
        return {"error": _short(error), "traceback": traceback.format_exc()[-2500:]}
    keep = () if case == "gradients" else (mask,)
    found, where = measure_difference(expected, got, *keep)
    result = {"difference": found, "where": where}
    if found > TOLERANCE:
        result["masks"] = sorted({call.mask for call in trace.calls - before})
        try:
            other, _ = run(SDPA)
            result["sdpa to eager"] = measure_difference(expected, other, *keep)[0]
            result["sdpa to flash"] = measure_difference(other, got, *keep)[0]
        except Exception as error:
            result["sdpa"] = _short(error)
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


def _status(report):
    cases = report["cases"].values()
    if any("error" in case for case in cases):
        return "error"
    if not report["calls"]:
        return "no call"
    if any(case.get("difference", 0) > TOLERANCE for case in cases):
        return "differs"
    return "equal" if report["noticed"] > TOLERANCE else "insensitive"


def _short(error):
    frames = traceback.extract_tb(error.__traceback__)
    place = next(
        (f for f in reversed(frames) if "/transformers/" in f.filename and "/tests/" not in f.filename), frames[-1]
    )
    return (
        f"{type(error).__name__}: {str(error)[:300]} ({place.filename.rpartition('site-packages/')[2]}:{place.lineno})"
    )

"""The cases in which two attentions of one model class are compared."""

import contextlib
import copy

import numpy
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import find
from .accepted import EAGER
from .difference import for_rows, is_tokenwise, outputs
from .feed import LENGTH, PADDED, masks

NEW_TOKENS, DECODED = 8, 3


class Comparison:
    """The cases of one model class, for a pair of attentions."""

    masks = masks()

    def __init__(self, models, feeder, feed):
        self.models, self.feeder, self.feed = models, feeder, feed
        self.generates = bool(getattr(feeder.model, "can_generate", lambda: False)()) and (
            feeder.is_text or feeder.is_seq2seq
        )
        self.causal = self.generates and not feeder.is_seq2seq
        self.pads = "input_ids" in feed and feed["input_ids"].shape[-1] == LENGTH and feeder.takes("attention_mask")
        self._reads_padding = {}

    def cases(self):
        """name -> function of an attention that gives (tensors by name, mask of the tokens that count)."""
        yield "forward", lambda attention: (self.run(attention, self.feed), None)
        if self.pads:
            for name, mask in self.masks.items():
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
        model = self.models[attention]  # it is built with random numbers
        with torch.no_grad():
            torch.manual_seed(0)
            return self._of_tokens(outputs(model(**copied(feed))))

    def _of_tokens(self, found):
        """Without the logits at what a decoder puts before its tokens (MusicgenMelody: the text and the melody)."""
        if self.feeder.is_seq2seq and "logits" in found and found["logits"].dim() == 3:
            found["logits"] = found["logits"][:, -LENGTH:]
        return found

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
            feed = self.feeder.padded(self.feed, mask)
            before = self.run(EAGER, feed)
            after = [self._disturbed(feed, mask, seed) for seed in range(4)]  # one may not move what is saturated
            self._reads_padding[side] = {
                name: sum(~torch.isclose(value, other[name], rtol=1e-5, atol=1e-6) for other in after) > 0
                for name, value in before.items()
                if not is_tokenwise(value, mask)
            }
        return self._reads_padding[side]

    def _disturbed(self, feed, mask, seed):
        """Eager attention's outputs when embeddings, and what layers make of them, are something else at padding."""
        model = self.models[EAGER]
        hooks = [model.get_input_embeddings().register_forward_hook(lambda _, i, out: _blurred(out, mask, seed))]
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                hooks.append(module.register_forward_hook(lambda _, i, out: _blurred(out, mask, seed)))
        try:
            return self.run(EAGER, feed)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def decode(self, attention):
        """Logits of a prefill and of tokens that follow one by one, the first sequence padded on the left."""
        model, mask = self.models[attention], self.masks["padded left"]
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

    def generate(self, attention, cache):
        tokens = self.generated(attention, cache)
        return {"tokens": getattr(tokens, "sequences", tokens).float()}

    @torch.no_grad()
    def generated(self, attention, cache, **more):
        """What `generate` gives, greedily; the first sequence is padded on the left."""
        feed = {k: v for k, v in self.feed.items() if k != "decoder_input_ids"}
        if self.causal and self.pads:
            feed = self.feeder.padded(feed, self.masks["padded left"])
        kept = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        if cache != "dynamic":
            kept["cache_implementation"] = cache
        model = self.models[attention]
        if self.feeder.is_seq2seq:
            kept["decoder_start_token_id"] = 2
        if hasattr(model.generation_config, "max_denoising_steps"):
            kept["max_denoising_steps"] = 4  # each samples from what rounding has changed in those before
        torch.manual_seed(0)
        return model.generate(**copied(feed), **kept, **more)

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
        mask = self.masks["padded right"] if self.pads else None
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
            found = self._of_tokens(outputs(model(**copied(feed))))
            generator, loss = torch.Generator().manual_seed(2), 0.0
            for name, value in found.items():
                if not value.requires_grad:
                    continue
                weight = torch.randn(value.shape, generator=generator)
                if name in ignored and ignored[name].shape == weight.shape:
                    weight = weight.masked_fill(ignored[name], 0.0)
                if mask is not None and is_tokenwise(value, mask):
                    rows = for_rows(mask, value)
                    weight = weight * rows.view(*rows.shape, *[1] * (value.dim() - 2))
                loss = loss + torch.where(torch.isfinite(value), value * weight, 0.0).sum()
            loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.numel()}
        finally:
            model.eval()
            model.zero_grad()


def _blurred(hidden, mask, seed):
    """Embeddings, or a layer's output, with something else at padding."""
    if isinstance(hidden, tuple):
        return (_blurred(hidden[0], mask, seed), *hidden[1:])
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or not is_tokenwise(hidden, mask):
        return hidden
    noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(seed))
    noise = 2.0 * noise * hidden.abs().mean().clamp_min(1.0)
    return hidden + (for_rows(mask, hidden) == 0)[..., None] * noise


def copied(feed):
    return copy.deepcopy(feed)  # a video's session keeps what the model remembers

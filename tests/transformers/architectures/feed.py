"""Inputs for a tiny model, from the signature of its `forward` and from its configuration."""

import inspect
import itertools

import torch

from . import particular, shrink

BATCH, LENGTH, PADDED = 2, 10, 3

_SIGLIP2 = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class Unfed(Exception):
    """The generic way does not know an input."""


class Feeder:
    """Makes the inputs of one model. The same seed gives the same inputs."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        try:
            self.text = self.config.get_text_config(decoder=True)
        except (ValueError, AttributeError):  # no part of it is the text's
            self.text = self.config
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(1)

    def takes(self, name):
        return name in self.parameters

    @property
    def is_text(self):
        return self.takes("input_ids") and self.model.main_input_name in ("input_ids", "inputs_embeds")

    @property
    def is_image_text(self):
        return hasattr(self.config, "vision_config") and hasattr(self.config, "text_config")

    @property
    def is_choice(self):
        return type(self.model).__name__.endswith("MultipleChoice")

    @property
    def is_seq2seq(self):
        return self.takes("decoder_input_ids")

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def ids(self, length=LENGTH, batch=BATCH):
        """Token numbers that mean nothing special."""
        vocabulary = _first(self.text, self.config, names=("vocab_size", "vocabulary_size"), default=shrink.VOCABULARY)
        vocabulary = vocabulary if isinstance(vocabulary, int) else shrink.VOCABULARY
        low, high = min(10, vocabulary // 4), max(min(shrink.VOCABULARY - 48, vocabulary), 2)
        return torch.randint(low, high, (batch, length), generator=self.generator)

    def variants(self):
        """Keyword arguments of a plain forward pass without a mask, the simplest first."""
        if particular_feed := particular.FEEDS.get(type(self.model).__name__):
            yield particular_feed(self)
            return
        plain = self.inputs()
        yield plain
        yield from self._other_parts(plain)
        for name in ("pixel_values", "hidden_states"):
            if name in plain:
                yield from ({**plain, name: value} for value in self.layouts())
        if "pixel_values" in plain and self.takes("input_ids"):
            both = {**plain, "input_ids": self._with_image(self.ids())}
            both.pop("decoder_input_ids", None)
            if self.takes("image_embeds_position_mask"):
                places = torch.arange(LENGTH) < _first(self.config, names=("latent_query_num",), default=0)
                both["image_embeds_position_mask"] = places.long().expand(BATCH, -1).clone()
            yield both
            yield {**both, "decoder_input_ids": self.ids()} if self.is_seq2seq else both
            if both["pixel_values"].dim() == 4:
                yield {**both, "pixel_values": both["pixel_values"][:, None]}
            for value in self.layouts():
                yield {**both, "pixel_values": value}
        if "input_values" in plain:
            for size in (8192, 16384):
                yield {**plain, "input_values": self.random(BATCH, size)}
        if self.takes("input_features"):
            for mels, frames in itertools.product((None, 128, 160, 560), (64, 80, 200, 128, 400)):
                yield from self._audio(plain, mels, frames)
        if self.takes("pixel_values") and self.takes("spatial_shapes"):
            yield {**plain, **{n: self.value(n) for n in self.parameters if n in _SIGLIP2}}
        if self.takes("context_input_ids"):
            yield {**plain, **self._documents()}
        if self.model.main_input_name == "pixel_values" and "pixel_values" in plain:
            for name in ("grid_thw", "image_grid_thw"):
                for value in (plain["pixel_values"], *self.patch_layouts()):
                    yield {**plain, "pixel_values": value, name: self.grid()}
        if self.takes("input_ids") and "input_ids" not in plain:
            yield {"input_ids": self.ids()}
            books = _first(self.config, names=("n_codes_total",), default=0)
            if books:
                yield {**plain, "input_ids": self.ids()[..., None].expand(-1, -1, books).clone()}

    def _with_image(self, ids):
        """Token numbers of which the first stand for an image, where it is known how many do."""
        names = ("image_token_id", "image_token_index", "video_token_index")
        token, count = _first(self.config, names=names, default=None), getattr(self.config, "num_query_tokens", 0)
        if isinstance(token, int) and count <= LENGTH:
            ids[:, :count] = token
        return ids

    def _audio(self, plain, mels, frames):
        """Features of so many frames, in either order, with a mask where one is taken."""
        mels = mels or _first(self.audio(), names=("num_mel_bins", "input_feat_size", "feature_size"), default=80)
        value = self.random(BATCH, mels, frames)
        masks = [n for n in self.parameters if n in ("input_features_mask", "feature_attention_mask")]
        given = {name: torch.ones(BATCH, frames, dtype=torch.long) for name in masks}
        for features in (value, value.transpose(1, 2).contiguous()):
            yield {**plain, **given, "input_features": features}

    def _documents(self):
        count = self.config.n_docs
        ids = self.ids(batch=BATCH * count)
        return {
            "context_input_ids": ids,
            "context_attention_mask": torch.ones_like(ids),
            "doc_scores": self.random(BATCH, count),
        }

    def layouts(self):
        """Images, or their patches, in the layouts and sizes that models take."""
        vision = self.vision()
        channels = _first(vision, names=("num_channels", "in_channels", "in_chans"), default=3)
        patch = _first(vision, names=("patch_size", "spatial_patch_size"), default=shrink.PATCH)
        patch = patch if isinstance(patch, int) else patch[-1]
        if self.takes("image_grid_thw") or self.takes("grid_thw"):
            yield from self.patch_layouts()
            return
        for count in (16, 64):
            yield self.random(BATCH, count, channels * patch * patch)
        if tiles := getattr(vision, "max_num_tiles", None):
            yield self.random(BATCH, 1, tiles, channels, shrink.IMAGE, shrink.IMAGE)
        yield self.random(BATCH, 2, channels, 64, 64)
        for height, width in ((64, 64), (48, 320), (128, 128), (224, 224)):
            yield self.random(BATCH, channels, height, width)

    def patch_layouts(self):
        """Patches of all images one after another."""
        vision = self.vision()
        channels = _first(vision, names=("num_channels", "in_channels", "in_chans"), default=3)
        patch = _first(vision, names=("patch_size", "spatial_patch_size"), default=shrink.PATCH)
        patch = patch if isinstance(patch, int) else patch[-1]
        count = int(self.grid().prod(1).sum())
        yield self.random(count, channels, patch, patch)
        yield self.random(1, count, channels, patch, patch)
        yield self.random(count, 2 * channels * patch * patch)
        yield self.random(count, 4 * patch * patch, channels)

    def _other_parts(self, plain):
        for name in ("pixel_values", "input_features", "encoder_hidden_states", "decoder_input_ids", "bbox"):
            if self.takes(name) and name not in plain:
                yield {**plain, name: self.value(name)}
        for name in ("pixel_values", "pixel_values_videos"):
            if name in plain and plain[name].dim() == 5:
                yield {**plain, name: plain[name].flatten(0, 1)}
            elif name in plain and plain[name].dim() == 4:
                yield {**plain, name: plain[name][:, None].expand(-1, 2, -1, -1, -1).clone()}
        if "input_features" in plain:
            yield {**plain, "input_features": plain["input_features"].transpose(1, 2)}
        if "input_values" in plain:
            yield {**plain, "input_values": plain["input_values"][:, None]}
        for name in ("input_ids", "decoder_input_ids"):
            books = _first(
                self.text, self.config, names=("num_codebooks", "num_channels", "num_code_groups"), default=0
            )
            if name in plain and isinstance(books, int) and books:
                # Tokens of several codebooks: by rows, by columns.
                ids = plain[name][:, None].expand(BATCH, books, LENGTH).clone()
                yield {**plain, name: ids.flatten(0, 1)}
                yield {**plain, name: ids}
                yield {**plain, name: ids.transpose(1, 2).contiguous()}
        if "input_ids" in plain and self.takes("inputs_embeds"):
            rest = {k: v for k, v in plain.items() if k != "input_ids"}
            yield {**rest, "inputs_embeds": self.make_inputs_embeds()}
        if self.takes("hidden_states"):
            yield {"hidden_states": self.make_inputs_embeds()}

    def inputs(self):
        named = [p for p in self.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        main = self.model.main_input_name
        if self.is_text or not named:
            feed = {"input_ids": self.make_input_ids()}
        else:
            feed = {main if self.takes(main) else named[0].name: None}
        for parameter in named:
            if feed.get(parameter.name, 0) is None or (
                parameter.default is inspect.Parameter.empty and parameter.name not in feed
            ):
                feed[parameter.name] = self.value(parameter.name)
        if self.is_seq2seq and "decoder_input_ids" not in feed:
            feed["decoder_input_ids"] = self.ids()
        return feed

    def value(self, name):
        maker = getattr(self, f"make_{name}", None)
        if maker is None:
            raise Unfed(f"no rule for the input {name}")
        return maker()

    def padded(self, feed, mask):
        """The feed with padding where the mask is 0."""
        pad = getattr(self.text, "pad_token_id", None)
        names = ["input_ids"]
        masks = {"attention_mask": mask}
        if hasattr(self.config, "canvas_length"):  # the decoder attends to the prompt, then to its own tokens
            masks["decoder_attention_mask"] = torch.cat([mask, torch.ones_like(mask)], 1)
        elif self.takes("decoder_attention_mask") and "decoder_input_ids" in feed:
            names.append("decoder_input_ids")
            masks["decoder_attention_mask"] = mask
        padded = {}
        for name, value in feed.items():
            if name in names and value.shape == mask.shape:
                padded[name] = value.masked_fill(mask == 0, 0 if not isinstance(pad, int) or pad < 0 else pad)
            elif name in names and self.is_choice:
                masks["attention_mask"] = mask[:, None].expand_as(value)
        return {**feed, **padded, **masks}

    # One method an input.

    def make_input_ids(self):
        ids = self.ids()
        if self.is_choice:
            return ids[:, None].expand(BATCH, 2, LENGTH).clone()
        eos = getattr(self.config, "eos_token_id", None)
        if self.is_seq2seq and isinstance(eos, int) and type(self.model).__name__.endswith("SequenceClassification"):
            ids[:, LENGTH // 2] = eos  # it reads the token at the end of the sequence
        return ids

    def make_decoder_input_ids(self):
        return self.ids()

    def make_token_type_ids(self):
        return torch.zeros(BATCH, LENGTH, dtype=torch.long)

    def make_past_values(self):
        length = _first(self.config, names=("context_length",), default=32)
        channels = _first(self.config, names=("num_input_channels",), default=None)
        return self.random(BATCH, length, *([] if channels is None else [channels]))

    def make_pixel_values_videos(self):
        frames = _first(self.vision(), names=("num_frames", "frames_per_clip"), default=4)
        size = _first(self.vision(), names=("image_size", "crop_size"), default=shrink.IMAGE)
        return self.random(BATCH, frames, 3, size, size)

    def make_qformer_input_ids(self):
        return self.ids()

    def make_bool_masked_pos(self):
        vision = self.vision()
        patches = (vision.image_size // vision.patch_size) ** 2 * (vision.num_frames // vision.tubelet_size)
        return (torch.arange(patches) % 2 == 0).expand(BATCH, -1)

    def make_attention_mask(self):
        return torch.ones(BATCH, LENGTH, dtype=torch.long)

    def make_inputs_embeds(self):
        return self.random(BATCH, LENGTH, self.hidden())

    make_encoder_hidden_states = make_query_embeds = make_inputs_embeds

    def make_hidden_states(self):
        if self.takes("grid_thw") or self.takes("image_grid_thw"):
            return self.patches()
        if self.takes("mask"):  # of audio
            return self.random(BATCH, shrink.FRAMES, _first(self.config, names=("input_size",), default=80))
        return self.make_inputs_embeds()

    def make_pixel_values(self):
        channels = _first(self.vision(), names=("num_channels", "in_channels", "in_chans"), default=3)
        size = _first(self.vision(), names=("image_size", "img_size"), default=shrink.IMAGE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if self.takes("image_grid_thw") or self.takes("grid_thw"):
            return self.patches()
        if self.takes("spatial_shapes"):
            patch = _first(self.vision(), names=("patch_size",), default=shrink.PATCH)
            return self.random(BATCH, 16, channels * patch * patch)
        frames = _first(self.vision(), names=("num_frames", "frames_per_clip"), default=None)
        shape = (BATCH, channels, height, width) if frames is None else (BATCH, frames, channels, height, width)
        return self.random(*shape)

    def make_input_features(self):
        audio = self.audio()
        mels = _first(audio, names=("num_mel_bins", "input_feat_size", "feature_size", "input_size"), default=80)
        positions = _first(audio, names=("max_source_positions",), default=None)
        frames = 2 * positions if positions else shrink.FRAMES
        if self.model.config.model_type.startswith(("whisper", "qwen2_audio", "moonshine", "voxtral", "audioflamingo")):
            return self.random(BATCH, mels, frames)
        return self.random(BATCH, frames, mels)

    def make_codebook_idx(self):
        return 1

    def make_pixel_position_ids(self):
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        return torch.stack([columns, rows], -1).flatten(0, 1).expand(BATCH, -1, -1).clone()

    def make_audio_mel(self):
        return self.random(BATCH, shrink.FRAMES, _first(self.audio(), names=("input_feat_size",), default=80))

    def make_audio_mel_mask(self):
        return torch.zeros(BATCH, shrink.FRAMES, dtype=torch.bool)  # True is padding

    def make_latents(self):
        return self.random(BATCH, self.hidden(), LENGTH)

    def make_noise_embeds(self):
        return self.random(BATCH, LENGTH, self.hidden())

    make_action_embeds = make_noise_embeds

    def make_context_hidden_states(self):
        layers = _first(self.config, names=("target_layer_ids",), default=[0])
        return self.random(BATCH, LENGTH, len(layers) * self.hidden())

    def make_inputs(self):
        return self.random(BATCH, 8000)

    def make_aspect_ratio_ids(self):
        return torch.ones(BATCH, 1, dtype=torch.long)

    def make_aspect_ratio_mask(self):
        return torch.ones(BATCH, 1, self.config.max_num_tiles, dtype=torch.long)

    def make_chunk_sample_lengths(self):
        return torch.full((BATCH,), shrink.FRAMES)

    def make_state(self):
        return self.random(BATCH, _first(self.config, names=("max_state_dim",), default=32))

    def make_mask(self):
        return torch.ones(BATCH, shrink.FRAMES, dtype=torch.bool)

    def make_marks(self):
        return torch.tensor([[4, 9]] * BATCH)

    def make_num_options(self):
        return torch.full((BATCH, 2), 2)

    def make_question_type_ids(self):
        return torch.zeros(BATCH, 2, dtype=torch.long)

    def make_codes(self):
        return self.ids()[:, None].expand(-1, _first(self.config, names=("num_quantizers",), default=4), -1).clone()

    def make_pixel_attention_mask(self):
        return torch.ones(BATCH, 16, dtype=torch.long)

    def make_spatial_shapes(self):
        return torch.tensor([[4, 4]] * BATCH)

    def make_merge_sizes(self):
        return torch.ones(BATCH, dtype=torch.long)

    def make_input_features_mask(self):
        return torch.ones(BATCH, shrink.FRAMES, dtype=torch.long)

    def make_input_values(self):
        mels, frames = (getattr(self.config, name, None) for name in ("num_mel_bins", "max_length"))
        if mels and frames:
            return self.random(BATCH, frames, mels)
        return self.random(BATCH, 8000)

    def grid(self):
        return torch.tensor([[1, 4, 4]] * BATCH)

    make_grid_thw = make_image_grid_thw = grid

    def patches(self):
        vision = self.vision()
        channels = _first(vision, names=("in_channels", "in_chans", "num_channels"), default=3)
        patch = _first(vision, names=("patch_size", "spatial_patch_size"), default=shrink.PATCH)
        frames = _first(vision, names=("temporal_patch_size",), default=1)
        return self.random(int(self.grid().prod(1).sum()), channels * frames * patch * patch)

    def make_bbox(self):
        corners = torch.randint(0, 20, (BATCH, LENGTH, 4), generator=self.generator)
        corners[..., 2:] += corners[..., :2]
        return corners

    def hidden(self):
        return _first(self.text, self.config, names=("hidden_size", "d_model", "n_embd"), default=shrink.HIDDEN)

    def vision(self):
        return (
            getattr(self.config, "vision_config", None) or getattr(self.config, "backbone_config", None) or self.config
        )

    def audio(self):
        return getattr(self.config, "audio_config", None) or getattr(self.config, "encoder_config", None) or self.config


def _first(*configs, names, default):
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return default


def masks(length=LENGTH):
    """case -> attention mask of the padded cases: the first sequence is shorter."""
    left, right = (torch.ones(BATCH, length, dtype=torch.long) for _ in range(2))
    left[0, :PADDED] = 0
    right[0, -PADDED:] = 0
    return {"padded left": left, "padded right": right}

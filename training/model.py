"""The model: a stock `VisionTextDualEncoderModel` of small towers, and classifiers that are used only in training.

The image tower is DPT's hybrid encoder: a residual network of dense 3x3 convolutions (`ResNetBackbone`) and one
transformer layer, whose class token is the pooled output. Dense convolutions learn more from little data than a plain
transformer, and a CPU with AMX computes them fastest; among the architectures of transformers with them, only this one
has the pooled output (b, c) that the dual encoder projects.
"""

import math

import torch
from torch import nn
from transformers import BertConfig, DPTConfig, ResNetConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from training.settings import Architecture

STRIDE = 16
"""Pixels of the image for one position of the last feature map: 4 by the stem, 2 by each of two stages."""


def describe(architecture: Architecture, *, vocabulary: int) -> VisionTextDualEncoderConfig:
    """Return the model configuration for an architecture."""
    places = math.ceil(architecture.image_pixels / STRIDE)
    channels = list(architecture.stage_channels)
    backbone = ResNetConfig(
        embedding_size=architecture.stem_channels,
        hidden_sizes=channels,
        depths=list(architecture.stage_depths),
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    vision = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone.to_dict(),
        backbone_featmap_shape=[1, channels[-1], places, places],
        neck_hidden_sizes=[*channels, channels[-1]],
        hidden_size=architecture.vision_width,
        num_hidden_layers=architecture.vision_layers,
        num_attention_heads=max(1, architecture.vision_width // 64),
        intermediate_size=architecture.vision_hidden,
        image_size=architecture.image_pixels,
        patch_size=STRIDE,
        layer_norm_eps=1e-6,
        pooler_act="linear",
    )
    text = BertConfig(
        vocab_size=vocabulary,
        hidden_size=architecture.text_width,
        num_hidden_layers=architecture.text_layers,
        num_attention_heads=max(1, architecture.text_width // 64),
        intermediate_size=architecture.text_hidden,
        max_position_embeddings=max(32, architecture.text_tokens),
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=architecture.embedding)


LARGEST_SCALE = 100.0


class Student(nn.Module):
    """The dual encoder, and linear classifiers over all concepts; only the dual encoder is exported."""

    def __init__(self, configuration: VisionTextDualEncoderConfig, *, concepts: int) -> None:
        """Initialise; projections are orthogonal, so that no direction of the features is lost at the start."""
        super().__init__()
        self.encoder = VisionTextDualEncoderModel(configuration)
        self.encoder.set_attn_implementation("eager")  # On a CPU its backward is three times as fast at 17 tokens.
        self.neck = nn.BatchNorm1d(configuration.vision_config.hidden_size, affine=False)
        self.classifier = nn.Linear(configuration.projection_dim, concepts)
        self.map_classifier = nn.Linear(configuration.vision_config.backbone_config.hidden_sizes[-1], concepts)
        vision = self.encoder.vision_model
        nn.init.orthogonal_(self.encoder.visual_projection.weight)
        nn.init.orthogonal_(vision.pooler.dense.weight)
        nn.init.orthogonal_(self.encoder.text_projection.weight)
        nn.init.trunc_normal_(vision.embeddings.position_embeddings, std=0.02)
        for layer in vision.encoder.layer:
            nn.init.normal_(layer.attention.attention.query.weight, std=0.005)  # The class token begins as the mean.
            nn.init.normal_(layer.attention.attention.key.weight, std=0.005)
            nn.init.orthogonal_(layer.attention.attention.value.weight)
            nn.init.orthogonal_(layer.attention.output.dense.weight)
            nn.init.zeros_(layer.output.dense.weight)

    def embed_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (b, embedding) of float (b, 3, h, w), not normalised, and the mean last map (b, channels).

        It computes what the stock image tower does, which neither returns the last map nor accepts other sizes.
        """
        vision = self.encoder.vision_model
        features = vision.embeddings.backbone(images).feature_maps[-1]
        tokens = vision.embeddings.projection(features).flatten(2).transpose(1, 2)
        places = vision.embeddings._resize_pos_embed(vision.embeddings.position_embeddings, *features.shape[-2:])  # noqa: SLF001
        tokens = torch.cat([vision.embeddings.cls_token.expand(len(images), -1, -1), tokens], dim=1) + places
        states = vision.layernorm(vision.encoder(tokens).last_hidden_state)
        return self.encoder.visual_projection(self.neck(vision.pooler(states))), features.mean(dim=(2, 3))

    def embed_texts(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embed int64 (k, t) with its mask (k, t) as (k, embedding), not normalised."""
        pooled: torch.Tensor = self.encoder.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output
        return pooled

    @property
    def scale(self) -> torch.Tensor:
        """The learned inverse temperature, at most CLIP's 100."""
        scale: torch.Tensor = self.encoder.logit_scale.exp().clamp(max=LARGEST_SCALE)
        return scale

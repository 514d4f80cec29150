"""What a family says of a model: its decoder, rotary embedding and vision tower; and how config.json is read."""

from trimkv_export.models.base.decoder import DecoderSpec, read_decoder, slides
from trimkv_export.models.base.reader import ConfigReader
from trimkv_export.models.base.rope import Rope, read_mrope, read_rope
from trimkv_export.models.base.vision import VisionModules, VisionSpec, VisualTokens
from trimkv_export.models.base.vision_reader import read_vision, read_visual_tokens

__all__ = [
    "ConfigReader",
    "DecoderSpec",
    "Rope",
    "VisionModules",
    "VisionSpec",
    "VisualTokens",
    "read_decoder",
    "read_mrope",
    "read_rope",
    "read_vision",
    "read_visual_tokens",
    "slides",
]

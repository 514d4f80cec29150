"""The package on disk: what `build` writes and everything else reads. No framework is imported here."""

from trimkv_export.package.package import (
    CONFIG,
    DECODER,
    DECODER_ENGINE,
    LLM_FOLDER,
    PLAN,
    VISION,
    VISION_ENGINE,
    EngineInfo,
    ModelInfo,
    Package,
    PackageConfig,
    QuantizationMethod,
    RopeInfo,
    VisionInfo,
    hash_file,
    is_package,
    parser_file,
)
from trimkv_export.package.staging import staged_folder, writing

__all__ = [
    "CONFIG",
    "DECODER",
    "DECODER_ENGINE",
    "LLM_FOLDER",
    "PLAN",
    "VISION",
    "VISION_ENGINE",
    "EngineInfo",
    "ModelInfo",
    "Package",
    "PackageConfig",
    "QuantizationMethod",
    "RopeInfo",
    "VisionInfo",
    "hash_file",
    "is_package",
    "parser_file",
    "staged_folder",
    "writing",
]

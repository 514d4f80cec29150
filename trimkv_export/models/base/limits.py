"""The largest sizes that are taken from a config.json, a checkpoint's or a package's.

A kilobyte of text can ask for any size. What lies beyond these is refused before a list, a graph or an allocation of
that size is made. Those of layers and heads are the kernels' (plugins/core/include/trimkv/types.h); the others are a
multiple of the largest models that are known.
"""

__all__ = [
    "LIMITS",
    "MAX_DEPTH",
    "MAX_HEADS",
    "MAX_HEAD_DIM",
    "MAX_INT32",
    "MAX_LAYERS",
    "MAX_PATCH",
    "MAX_PIXELS",
    "MAX_VOCABULARY",
    "MAX_WIDTH",
]

MAX_LAYERS = 128
MAX_HEAD_DIM = 256
MAX_HEADS = 1024
MAX_WIDTH = 1 << 20  # of activations: hidden and intermediate sizes
MAX_VOCABULARY = 1 << 24
MAX_INT32 = 2**31 - 1  # what positions and indices are stored as
MAX_DEPTH = 256  # blocks of a vision tower
MAX_PATCH = 1024  # pixels along a patch, frames in one, patches along a token
MAX_PIXELS = 1 << 15  # along a side of a tower's image or window

# By the key of a config.json; a vision tower's section has some of the same.
LIMITS = {
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": MAX_HEAD_DIM,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "vocab_size": MAX_VOCABULARY,
    "depth": MAX_DEPTH,
    "num_heads": MAX_HEADS,
    "patch_size": MAX_PATCH,
    "temporal_patch_size": MAX_PATCH,
    "spatial_merge_size": MAX_PATCH,
    "image_size": MAX_PIXELS,
    "window_size": MAX_PIXELS,
    "num_position_embeddings": MAX_WIDTH,
}

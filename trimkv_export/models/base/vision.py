"""What the graph and the runtime need to know of a vision tower, the same for every family."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["VisionModules", "VisionSpec", "VisualTokens"]


@dataclass(frozen=True)
class VisualTokens:
    """Ids of the tokens that stand for, and enclose, images and video frames; None where a model has no such token."""

    image_token_id: int
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class VisionModules:
    """Names of the tower's modules below its prefix; None where it has no such module.

    `position` and `class_embedding` are tensors. `block` and `deepstack` have {} for a number; norm1 to mlp_out lie in
    a block, merger_norm to merger_out in the merger and in those of `deepstack`. `qkv` is a projection each, or a fused
    one; `mlp_in` one projection, or gate and up of a gated MLP.
    """

    patch: str
    position: str | None = None
    class_embedding: str | None = None
    pre_norm: str | None = None
    block: str
    norm1: str
    norm2: str
    qkv: Sequence[str]
    proj: str
    mlp_in: Sequence[str]
    mlp_out: str
    merger: str
    merger_norm: str | None = None
    merger_in: str
    merger_out: str
    deepstack: str | None = None


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """A vision tower: patches through pre-norm blocks, then groups of them merged into tokens of the decoder.

    Field names follow Hugging Face's `vision_config`. Patch sizes are in pixels, `spatial_merge_size` in patches.

    Attributes:
        prefix: what the names of the tower's tensors begin with.
        unused: beginnings of the names of further tensors that the checkpoint may hold, and no token depends on.
        depth: blocks that run.
        merger_size: inner width of the merger.
        rms_norm: norms are RMSNorm, not LayerNorm.
        num_position_embeddings: learned ones; a square that is stretched over the picture, or, with `image_size`, one
            for each patch, after that of the class token.
        rotary: queries and keys turn with row and column of their patch.
        image_size: every image is this many pixels high and wide; None: any whole number of tokens.
        keeps_class_token: the class token goes to the decoder too, before the patches.
        window_size: attention stays within windows of this many pixels, but for the blocks `fullatt_block_indexes`.
        deepstack_visual_indexes: the blocks whose output is merged too, by a merger each, for the decoder's first
            layers.
        tokens_per_second: a video's positions in time are its seconds times this, and the prompt has no timestamps.
            None: timestamps, or no video.
    """

    prefix: str
    modules: VisionModules
    unused: Sequence[str] = ()
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    hidden_act: str
    rms_norm: bool = False
    norm_eps: float = 1e-6
    patch_size: int
    temporal_patch_size: int = 1
    patch_bias: bool = True
    num_position_embeddings: int | None = None
    rotary: bool = True
    image_size: int | None = None
    keeps_class_token: bool = False
    window_size: int | None = None
    fullatt_block_indexes: Sequence[int] = ()
    spatial_merge_size: int = 1
    merger_size: int
    merger_act: str = "gelu"
    merger_bias: bool = True
    out_hidden_size: int
    deepstack_visual_indexes: Sequence[int] = ()
    tokens_per_second: float | None = None

    @property
    def head_dim(self) -> int:
        """D of the tower's attention."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch: RGB, of `temporal_patch_size` frames."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of a token's patches, put together."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def image_patches(self) -> int:
        """Patches of an image, where all have the same size; else 0."""
        return 0 if self.image_size is None else (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """Tokens of an image, where all have the same size; else 0."""
        return self.image_patches and self.image_patches // self.spatial_merge_size**2 + self.keeps_class_token

    @property
    def window_side(self) -> int | None:
        """Tokens along a side of a window."""
        return self.window_size and self.window_size // (self.patch_size * self.spatial_merge_size)

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens of an image, or of a temporal patch of a video, of height x width patches."""
        return height * width // self.spatial_merge_size**2 + self.keeps_class_token

    def block(self, index: int) -> str:
        """Path of a block."""
        return self.modules.block.format(index)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold, by name, with its shape."""
        return {f"{self.prefix}{name}": shape for name, shape in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        names, h = self.modules, self.hidden_size

        def linear(name: str, rows: int, *columns: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield f"{name}.weight", (rows, *columns)
            if bias:
                yield f"{name}.bias", (rows,)

        def norm(name: str | None, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            if name is not None:
                yield f"{name}.weight", (size,)
                if not self.rms_norm:
                    yield f"{name}.bias", (size,)

        # A tower of images alone has a kernel of two dimensions.
        depth = () if self.image_size else (self.temporal_patch_size,)
        yield from linear(names.patch, h, 3, *depth, self.patch_size, self.patch_size, bias=self.patch_bias)
        if names.class_embedding is not None:
            yield names.class_embedding, (h,)
        if names.position is not None and self.num_position_embeddings is not None:
            yield names.position, (self.num_position_embeddings, h)
        yield from norm(names.pre_norm, h)
        for index in range(self.depth):
            block = self.block(index)
            yield from norm(f"{block}.{names.norm1}", h)
            yield from norm(f"{block}.{names.norm2}", h)
            for name in names.qkv:
                yield from linear(f"{block}.{name}", 3 // len(names.qkv) * h, h)
            yield from linear(f"{block}.{names.proj}", h, h)
            for name in names.mlp_in:
                yield from linear(f"{block}.{name}", self.intermediate_size, h)
            yield from linear(f"{block}.{names.mlp_out}", h, self.intermediate_size)
        mergers = {names.merger: h}  # norms patches; the DeepStack mergers norm what is merged
        if names.deepstack is not None:
            mergers |= {names.deepstack.format(k): self.merged_size for k in range(len(self.deepstack_visual_indexes))}
        for name, normed in mergers.items():
            yield from norm(names.merger_norm and f"{name}.{names.merger_norm}", normed)
            yield from linear(f"{name}.{names.merger_in}", self.merger_size, self.merged_size, bias=self.merger_bias)
            yield from linear(
                f"{name}.{names.merger_out}", self.out_hidden_size, self.merger_size, bias=self.merger_bias
            )

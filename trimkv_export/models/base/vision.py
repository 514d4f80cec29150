"""What the graph and the runtime need to know of a vision tower."""

from dataclasses import dataclass

__all__ = ["VisionSpec", "VisualTokens"]


@dataclass(frozen=True)
class VisualTokens:
    """Ids of the tokens that stand for, and enclose, images and video frames."""

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


@dataclass(frozen=True)
class VisionSpec:
    """A vision tower: patches through pre-norm blocks, then groups of them merged into tokens of the decoder.

    Field names follow Hugging Face's `vision_config`. `deepstack_visual_indexes`: the blocks whose output is merged
    too, by a merger each, for the decoder's first layers.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    hidden_act: str
    layer_norm_eps: float = 1e-6
    prefix: str = "model.visual."

    @property
    def head_dim(self) -> int:
        """D of the tower's attention."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of the patches of a token side by side."""
        return self.hidden_size * self.spatial_merge_size**2

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold, by name, with its shape."""
        out: dict[str, tuple[int, ...]] = {}
        h, merged = self.hidden_size, self.merged_size

        def linear(name: str, rows: int, *columns: int) -> None:
            out[f"{self.prefix}{name}.weight"], out[f"{self.prefix}{name}.bias"] = (rows, *columns), (rows,)

        def norm(name: str, size: int) -> None:
            out[f"{self.prefix}{name}.weight"] = out[f"{self.prefix}{name}.bias"] = (size,)

        patch = self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size
        linear("patch_embed.proj", h, *patch)
        out[f"{self.prefix}pos_embed.weight"] = (self.num_position_embeddings, h)
        for index in range(self.depth):
            block = f"blocks.{index}"
            norm(f"{block}.norm1", h)
            norm(f"{block}.norm2", h)
            linear(f"{block}.attn.qkv", 3 * h, h)
            linear(f"{block}.attn.proj", h, h)
            linear(f"{block}.mlp.linear_fc1", self.intermediate_size, h)
            linear(f"{block}.mlp.linear_fc2", h, self.intermediate_size)
        mergers = {"merger": h}  # norms patches; the DeepStack mergers norm what is merged
        mergers |= {f"deepstack_merger_list.{k}": merged for k in range(len(self.deepstack_visual_indexes))}
        for name, normed in mergers.items():
            norm(f"{name}.norm", normed)
            linear(f"{name}.linear_fc1", merged, merged)
            linear(f"{name}.linear_fc2", self.out_hidden_size, merged)
        return out

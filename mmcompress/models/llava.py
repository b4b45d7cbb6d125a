"""LLaVA: one view per image; CLIP, DINOv2 or SigLIP tower."""

from mmcompress.models.call import Call
from mmcompress.models.generic import Family, ItemSpec
from mmcompress.models.llava_next import extents


class Llava(Family):
    name = "llava"
    offers = ("cls_logits", "keys", "tower")
    notes = "one view per image"

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec] | None:
        """Pixtral-like towers (image_sizes) give images of different lengths, all others one length."""
        sizes = call.argument(kind, "image_sizes")
        lengths = call.encoded[kind].lengths if kind in call.encoded else None
        if sizes is not None and lengths is not None and sum(lengths) == num_rows:
            return self.pictures(lengths, extents(sizes))
        pixels = call.argument(kind, "pixel_values")
        if call.argument(kind, "image_sizes") is not None or not len(pixels) or num_rows % len(pixels):
            return super().specs(call, kind, num_rows)
        return self.squares(kind, [num_rows // len(pixels)] * len(pixels))

    def pictures(self, lengths: list[int], sizes: list[list[int]]) -> list[ItemSpec]:
        """Pictures of n rows each whose tokens lie as their patches do (Pixtral), a line where the sizes do not say how."""
        patch, start = self.config.vision_config.patch_size, 0
        out: list[ItemSpec] = []
        for n, (height, width) in zip(lengths, sizes, strict=True):
            h, w = height // patch, width // patch
            out.append(ItemSpec.lattice("image", (1, h, w) if h * w == n else (n, 1, 1), start))
            start += n
        return out

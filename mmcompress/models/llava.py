"""LLaVA: one view per image; CLIP, DINOv2 or SigLIP tower."""

from mmcompress.models.call import Call
from mmcompress.models.generic import Family, ItemSpec


class Llava(Family):
    name = "llava"
    offers = ("cls_logits", "keys", "tower")
    notes = "one view per image"

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec] | None:
        """Pixtral-like towers (image_sizes) give images of different lengths, all others one length."""
        pixels = call.argument(kind, "pixel_values")
        if call.argument(kind, "image_sizes") is not None or not len(pixels) or num_rows % len(pixels):
            return super().specs(call, kind, num_rows)
        return self.squares(kind, [num_rows // len(pixels)] * len(pixels))

"""LLaVA: one view per image; CLIP, DINOv2 or SigLIP tower."""

from mmcompress.models.generic import Family


class Llava(Family):
    name = "llava"
    offers = ("cls_logits", "keys", "tower")
    notes = "one view per image"

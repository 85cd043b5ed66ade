"""diffusers' HiDream pipeline at the sizes that it is asked for. Import it where diffusers is imported."""

from __future__ import annotations

import functools
import math
from typing import Any

from diffusers import HiDreamImagePipeline


class SizedHiDreamPipeline(HiDreamImagePipeline):
    """The pipeline itself stretches every size to an area of 1024 x 1024 pixels. Here it keeps the size; only pictures
    that are not square and have more tokens than the network pads to are made smaller."""

    @functools.wraps(HiDreamImagePipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        height, width = kwargs.get("height"), kwargs.get("width")
        if height and width:
            unit = self.vae_scale_factor * self.transformer.config.patch_size
            area = height * width
            if height != width:
                area = min(area, self.transformer.max_seq * unit**2)
            # It rounds down to whole tokens, so the root must not fall short by its rounding.
            self.default_sample_size = math.sqrt(area) * (1 + 1e-9) / self.vae_scale_factor
        return super().__call__(*args, **kwargs)

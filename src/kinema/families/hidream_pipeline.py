"""diffusers' HiDream pipeline at the sizes that it is asked for, with all noise from the generators that it is given.
Import it where diffusers is imported."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

from diffusers import HiDreamImagePipeline


class SizedHiDreamPipeline(HiDreamImagePipeline):
    """The pipeline itself stretches every size to an area of 1024 x 1024 pixels. Here it keeps the size; only pictures
    that are not square and have more tokens than the network pads to are made smaller.

    The scheduler of the distilled variants adds noise in every step, which the pipeline has it draw from torch's global
    generator. Here it comes from the call's."""

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
        scheduler: Any = self.scheduler
        if "generator" in inspect.signature(scheduler.step).parameters:
            scheduler.step = functools.partial(scheduler.step, generator=kwargs.get("generator"))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(scheduler).pop("step", None)

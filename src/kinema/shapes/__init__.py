"""The embedded world: one coloured shape moving over a plain background, its captions, and the judge of videos.

`world` renders clips and writes datasets, `judge` names what a video shows from its pixels alone, `models` writes a
tiny diffusers directory of the Wan type to train on them. Nothing is imported here, so that a command that needs only
numpy does not pay for torch.
"""

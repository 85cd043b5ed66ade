"""kinema: train, fine-tune, distil, personalise and sample open image and video diffusion models."""

__version__ = "0.1.0"

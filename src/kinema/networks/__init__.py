"""Networks that diffusers lacks, under the parameter names of their published checkpoints."""

"""What samplers are used for beside sampling from noise; each task works with every sampler that can do it."""

from samplers.job import Result
from samplers.tasks.img2img import img2img
from samplers.tasks.inpainting import extended, inpaint, outpaint, with_known
from samplers.tasks.interpolation import interpolate, interpolate_images, lerp, slerp
from samplers.tasks.inverse import ddnm, dps, pigdm, restore, super_resolution
from samplers.tasks.inversion import Mirrored, MirroredModel, Reconstruction, invert, reconstruct
from samplers.tasks.likelihood import Likelihood, bits_per_dimension, dequantise, log_likelihood
from samplers.tasks.operators import Blur, Downsample, Grey, Mask, Matrix, Operator
from samplers.tasks.resampling import resampled

__all__ = [
    "Blur",
    "Downsample",
    "Grey",
    "Likelihood",
    "Mask",
    "Matrix",
    "Mirrored",
    "MirroredModel",
    "Operator",
    "Reconstruction",
    "Result",
    "bits_per_dimension",
    "ddnm",
    "dequantise",
    "dps",
    "extended",
    "img2img",
    "inpaint",
    "interpolate",
    "interpolate_images",
    "invert",
    "lerp",
    "log_likelihood",
    "outpaint",
    "pigdm",
    "reconstruct",
    "resampled",
    "restore",
    "slerp",
    "super_resolution",
    "with_known",
]

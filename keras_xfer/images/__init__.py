"""Folders of images: splits, class names, and what was skipped and why.

`scan` looks once at every file, `ImageDataset` feeds the readable ones to `model.fit`, and
`load_image` is how each of them is decoded.
"""

from keras_xfer.images.augmentation import augmentation_ranges, make_augmentation
from keras_xfer.images.dataset import ImageDataset, Sample, class_weights
from keras_xfer.images.folders import (
    IMAGE_SUFFIXES,
    ImageFolder,
    ImageFolderError,
    list_images,
    scan,
)
from keras_xfer.images.pixels import ImageReadError, Skipped, load_image, readable_images

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageDataset",
    "ImageFolder",
    "ImageFolderError",
    "ImageReadError",
    "Sample",
    "Skipped",
    "augmentation_ranges",
    "class_weights",
    "list_images",
    "load_image",
    "make_augmentation",
    "readable_images",
    "scan",
]

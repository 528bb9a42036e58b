"""Mask R-CNN, of torchvision's parts."""

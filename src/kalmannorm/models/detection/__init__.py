"""Define two Mask R-CNNs from torchvision's parts: C4 and FPN."""

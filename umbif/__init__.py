"""UMBIF: from folders of brain MRI to a pretrained 3D encoder and its clinical evaluation."""

__version__ = "0.1.0"

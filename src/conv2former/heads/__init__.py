"""What stands on the backbone for tasks beyond classification: detectors and segmenters, as plain modules."""

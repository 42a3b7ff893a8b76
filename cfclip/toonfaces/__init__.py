"""The embedded domain: cartoon faces that we draw ourselves, so that every edit has a ground truth."""

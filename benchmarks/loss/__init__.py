"""The multi-positive loss against the published form and the losses of other libraries."""

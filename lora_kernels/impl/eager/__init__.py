"""impl="eager": few, in-place ATen calls on any device."""

"""Patch sampling in the training loops of other libraries; each module needs its library, and none is a dependency."""

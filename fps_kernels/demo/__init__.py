"""The demonstration behind ``fps-kernels demo``: choose, tune, compare, on a model that ships with the package."""
